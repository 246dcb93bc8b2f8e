"""Whether a router finds what its servers have cached.

A router of vLLM's that lacks something routes by load alone, and says nothing: each
finding here is something that it may lack.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_radix.exits import CommandError
from vllm_radix_bench.ab.web import HttpError
from vllm_radix_bench.doctor.events import Heard, Listener
from vllm_radix_bench.doctor.finding import Finding, note, ok, problem
from vllm_radix_bench.doctor.servers import Server, complete, told_by
from vllm_radix_bench.top.kv_events import check_that_something_listens

_SETTLE_SECONDS = 1.0
"""Until a router has counted events that the doctor has heard."""
_EVENTS_CONFIG = (
    "--kv-events-config "
    '\'{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557"}\''
)


@dataclass(frozen=True)
class Asked:
    """What the doctor is to look at.

    Attributes:
        router: its address.
        servers: behind it; empty for those that it tells.
        sources: endpoints of events of each server, in order of ranks; empty if the
            router does not use events.
        block_size: that the router takes events to have.
        headers: that each request carries.
        seconds: that events may take.
    """

    router: str
    servers: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    block_size: int
    headers: Mapping[str, str]
    seconds: float


def examine(asked: Asked) -> Iterator[Finding]:
    """Yield what is found."""
    servers = [Server(url, (), asked.headers) for url in asked.servers]
    if not servers:
        try:
            servers = told_by(asked.router, asked.headers)
        except HttpError as error:
            yield problem(
                "router",
                f"{asked.router} does not tell its servers ({error})",
                "give the address at which requests are sent to vllm-router; of "
                "another router, name its servers with --server URL",
            )
            return
    if not servers:
        yield problem("router", "it knows no server", "see its --worker-urls")
        return
    names = [f"{one.url}@{rank}" for one in servers for rank in one.ranks]
    names += [one.url for one in servers if not one.ranks]
    yield ok("router", f"{asked.router} sends to {', '.join(sorted(names))}")
    answering = []
    for server in servers:
        found = [*_server(server, asked)]
        yield from found
        if server.model:
            answering.append(server)
    if len({server.model for server in answering}) > 1:
        models = ", ".join(sorted({server.model for server in answering}))
        yield note("model", f"the servers name different ones: {models}")
    if asked.sources:
        yield from _events(asked, servers, answering)
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


def _events(
    asked: Asked, servers: Sequence[Server], answering: Sequence[Server]
) -> Iterator[Finding]:
    """Yield whether events of each server are heard where the router hears them."""
    known = {server.url for server in servers}
    for url in sorted({*asked.sources} - known):
        yield problem(
            f"events {url}",
            "is the source of a server that the router does not know",
            f"write the server as the router does: {', '.join(sorted(known))}",
        )
    heard_of: list[Server] = []
    for server in servers:
        found = [*_sources(server, asked.sources.get(server.url, ()))]
        yield from found
        if not found and server in answering:
            heard_of.append(server)
    endpoints = [e for server in heard_of for e in asked.sources[server.url]]
    listener = Listener(endpoints)
    try:
        good = bool(heard_of) and len(heard_of) == len(servers)
        held: list[tuple[Server, list[int]]] = []
        for server in heard_of:
            for rank in server.ranks or (None,):
                prompt = _new_prompt(server, asked.block_size)
                found = [*_probe(asked, listener, server, rank, prompt)]
                yield from found
                good = good and all(one.fix == "" for one in found)
                held.append((server, prompt))
        if good and len(held) > 1:
            yield _routing(asked, listener, held)
    finally:
        listener.close()


_SENT_EACH = 3
"""Times that a prompt is sent through the router."""


def _sources(server: Server, endpoints: Sequence[str]) -> Iterator[Finding]:
    """Yield what is wrong with the sources of a server's events."""
    subject = f"events {server.url}"
    wanted = max(1, len(server.ranks))
    if len(endpoints) < wanted:
        each = ",".join(["tcp://HOST:PORT"] * wanted)
        yield problem(
            subject,
            f"ranks: {wanted}, sources of their events: {len(endpoints)}",
            f"give the router --kv-event-source {server.url}={each}; rank r publishes "
            "at the port of the first + r",
        )
        return
    for endpoint in endpoints:
        try:
            check_that_something_listens("--events", endpoint)
        except CommandError as error:
            found = str(error).removeprefix("--events: ").partition("): ")[0]
            fix = f"start the server with {_EVENTS_CONFIG}; vLLM listens only at a *"
            yield problem(subject, f"{found})", fix)


def _new_prompt(server: Server, block_size: int) -> list[int]:
    """Return a prompt of more than two blocks that nobody has cached.

    Its tokens are small numbers, which every vocabulary has.
    """
    length = 2 * max(server.block_size or 0, block_size) + 1
    if server.max_model_len:
        length = min(length, server.max_model_len - 1)
    draw = random.SystemRandom()
    return [draw.randrange(10, 110) for _ in range(length)]


def _probe(
    asked: Asked,
    listener: Listener,
    server: Server,
    rank: int | None,
    prompt: Sequence[int],
) -> Iterator[Finding]:
    """Yield what is heard of a request that a server, or a rank of it, serves."""
    subject = f"events {server.url}" + ("" if rank is None else f" rank {rank}")
    try:
        server.complete(prompt, rank)
    except HttpError as error:
        fix = "see the server's log"
        yield problem(subject, f"a request of {len(prompt)} tokens fails: {error}", fix)
        return
    heard = listener.hear(asked.seconds, lambda one: one.begins(prompt))
    if not heard or not heard[-1].begins(prompt):
        strange = next((one for one in heard if one.stored is None), None)
        if strange is not None:
            fix = "name the endpoint of --kv-events-config"
            said = f"what comes from {strange.endpoint} is no KV event of vLLM's"
            yield problem(subject, said, fix)
        else:
            told = f"none came within {asked.seconds:g} s of a request"
            yield problem(subject, told, f"start the server with {_EVENTS_CONFIG}")
        return
    yield from _told(asked, subject, server, rank, heard[-1])


def _told(
    asked: Asked, subject: str, server: Server, rank: int | None, heard: Heard
) -> Iterator[Finding]:
    """Yield whether a message that came is one from which the router learns."""
    good = True
    own = asked.sources[server.url]
    expected = own if rank is None else own[rank : rank + 1]
    if heard.endpoint not in expected:
        good = False
        yield problem(
            subject,
            f"come from {heard.endpoint}, and the router hears "
            f"{' and '.join(expected)} for it",
            "order the endpoints of --kv-event-source by rank, each at its server",
        )
    if heard.topic:
        good = False
        yield problem(
            subject,
            f"are published under the topic {heard.topic!r}, and the router hears the "
            "empty one alone",
            'leave "topic" out of the server\'s --kv-events-config',
        )
    sizes = sorted({event.block_size for event in heard.stored or ()})
    if sizes != [asked.block_size]:
        good = False
        yield problem(
            subject,
            f"are of blocks of {sizes[0]} tokens, and the router looks for blocks of "
            f"{asked.block_size}: it finds no prompt",
            f"give the router --kv-event-block-size {sizes[0]}",
        )
    if good:
        told = f"come from {heard.endpoint}, in blocks of {asked.block_size}"
        yield ok(subject, told)


def _routing(
    asked: Asked, listener: Listener, held: Sequence[tuple[Server, list[int]]]
) -> Finding:
    """Return whether the router sends prompts to where they are cached.

    Each several times in a row, which a router that takes turns sends to several
    servers. One that has not cached a prompt tells of its blocks once it is sent there.
    """
    time.sleep(_SETTLE_SECONDS)
    for server, prompt in held:
        for _ in range(_SENT_EACH):
            try:
                complete(asked.router, server.model, prompt, asked.headers)
            except HttpError as error:
                said = f"a request through the router fails: {error}"
                return problem("routing", said, "see the router's log")
    heard = list(listener.hear(_SETTLE_SECONDS))
    missed = sum(any(one.begins(prompt) for one in heard) for _, prompt in held)
    if missed:
        return note(
            "routing",
            f"{missed} of {len(held)} prompts went where they were not cached, by load "
            "or by another policy",
            "look at an idle router with --policy kv_aware",
        )
    return ok("routing", f"{len(held)} of {len(held)} prompts went where they are held")
