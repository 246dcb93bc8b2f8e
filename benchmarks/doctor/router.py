"""Whether a router finds what its servers have cached.

A router of vLLM's that lacks something routes by load alone, and says nothing: each
finding here is something that it may lack.
"""

from collections.abc import Iterator

from vllm_radix_bench.ab.web import HttpError
from vllm_radix_bench.doctor.at_once import at_once
from vllm_radix_bench.doctor.finding import Finding, note, ok, problem
from vllm_radix_bench.doctor.router_events import Asked, examine_events
from vllm_radix_bench.doctor.servers import Server, StrangeError, told_by


def examine(asked: Asked) -> Iterator[Finding]:
    """Yield what is found."""
    servers = [Server(url, (), asked.headers) for url in asked.servers]
    if not servers:
        try:
            servers, strange = told_by(asked.router, asked.headers)
        except HttpError as error:
            yield problem(
                "router",
                f"{asked.router} does not tell its servers ({error})",
                "give the address at which requests are sent to vllm-router; of "
                "another router, name its servers with --server URL",
            )
            return
        for named in strange:
            told = f"names {named!r:.80}, which is no address of HTTP: not looked at"
            yield note("router", told, "see its --worker-urls")
        if not servers and not strange:
            yield problem("router", "it knows no server", "see its --worker-urls")
        if not servers:
            return
    names = [f"{one.url}@{rank}" for one in servers for rank in one.ranks]
    names += [one.url for one in servers if not one.ranks]
    yield ok("router", f"{asked.router} sends to {', '.join(sorted(names))}")
    for found in at_once(lambda server: [*_server(server, asked)], servers):
        yield from found
    models = sorted({server.model for server in servers} - {""})
    if len(models) > 1:
        yield note("model", f"the servers name different ones: {', '.join(models)}")
    if asked.sources:
        yield from examine_events(asked, servers)
    else:
        yield note(
            "events",
            "were not looked at, for no source was named; the router learns of none "
            "by itself",
            "for --policy kv_aware give the doctor the router's --kv-event-source",
        )


def _server(server: Server, asked: Asked) -> Iterator[Finding]:
    """Yield what a server says of itself, and whether it tokenizes for the router."""
    subject = f"server {server.url}"
    try:
        server.look()
    except StrangeError as error:
        fix = "give the address of a server of vLLM's"
        yield problem(subject, f"answers, but {error}", fix)
        return
    except HttpError as error:
        yield problem(
            subject,
            f"does not answer ({error})",
            "run the doctor where the router runs, and start the server",
        )
        return
    size = f", blocks of {server.block_size}" if server.block_size else ""
    radix = ", radix" if server.radix else ""
    yield ok(subject, f"{server.model}{size}{radix}")
    if server.engines > max(1, len(server.ranks)) and not asked.servers:
        yield note(
            subject,
            f"has {server.engines} engines, between which vLLM chooses by load alone",
            f"give the router --intra-node-data-parallel-size {server.engines}",
        )
    subject = f"render {server.url}"
    try:
        server.tokens_of("a prompt")
    except HttpError as error:
        why = "without the tokens of a text the router routes it by load alone"
        if error.status in (403, 404):
            fix = "start the server with --enable-scale-out"
            yield problem(subject, f"answers {error.status}: {why}", fix)
        else:
            yield problem(subject, f"fails ({error}): {why}", "see the server's log")
    else:
        yield ok(subject, "tells the tokens of a text")
