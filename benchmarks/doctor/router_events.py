"""Whether a router hears what its servers have cached, and routes by it."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_radix.exits import CommandError
from vllm_radix_bench.ab.web import HttpError
from vllm_radix_bench.doctor.at_once import at_once
from vllm_radix_bench.doctor.events import Heard, Listener
from vllm_radix_bench.doctor.finding import Finding, Status, note, ok, problem
from vllm_radix_bench.doctor.servers import Server, complete
from vllm_radix_bench.top.kv_events import check_that_something_listens

_SETTLE_SECONDS = 1.0
"""Until a router has counted events that the doctor has heard."""
_LARGE_BLOCK = 2048
"""Tokens of a block that is seen though its server does not tell the size."""
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


@dataclass
class _Probe:
    """A prompt that an engine is to cache.

    Attributes:
        server: that has the engine.
        rank: of the engine; None for a server as one.
        prompt: its tokens, which nobody has cached; none if there can be no block.
        error: why the request failed, once it was sent.
        heard: the message that tells of the prompt, once it came.
    """

    server: Server
    rank: int | None
    prompt: list[int] = field(repr=False)
    error: HttpError | None = None
    heard: Heard | None = None

    @property
    def subject(self) -> str:
        """Of findings."""
        of_rank = "" if self.rank is None else f" rank {self.rank}"
        return f"events {self.server.url}{of_rank}"

    def send(self) -> None:
        """Have the engine compute the prompt."""
        try:
            self.server.complete(self.prompt, self.rank)
        except HttpError as error:
            self.error = error


def examine_events(asked: Asked, servers: Sequence[Server]) -> Iterator[Finding]:
    """Yield whether events of each server are heard where the router hears them.

    Args:
        asked: what to look at.
        servers: of the router; those that answered know their model.
    """
    known = {server.url for server in servers}
    for url in sorted({*asked.sources} - known):
        yield problem(
            f"events {url}",
            "is the source of a server that the router does not know",
            f"write the server as the router does: {', '.join(sorted(known))}",
        )
    named = [e for url in sorted(known) for e in asked.sources.get(url, ())]
    silent = dict(zip(named, at_once(_why_silent, named), strict=True))
    heard_of: list[Server] = []
    for server in servers:
        found = [*_sources(server, asked.sources.get(server.url, ()), silent)]
        yield from found
        if not found and server.model:
            heard_of.append(server)
    endpoints = [e for server in heard_of for e in asked.sources[server.url]]
    listener = Listener([*dict.fromkeys(endpoints)])
    try:
        probes = [
            _Probe(server, rank, _new_prompt(server, asked.block_size))
            for server in heard_of
            for rank in server.ranks or (None,)
        ]
        heard = _compute(asked, listener, [one for one in probes if one.prompt])
        findings = [
            finding for probe in probes for finding in _found_of(asked, probe, heard)
        ]
        yield from findings
        all_heard = all(one.status is Status.OK for one in findings)
        if all_heard and len(heard_of) == len(servers) and len(probes) > 1:
            yield _routing(asked, listener, probes)
    finally:
        listener.close()


def _why_silent(endpoint: str) -> str:
    """Return why nothing can come from an endpoint; empty if something listens."""
    option = "--kv-event-source"
    try:
        check_that_something_listens(option, endpoint)
    except CommandError as error:
        return str(error).removeprefix(f"{option}: ").partition("): ")[0] + ")"
    return ""


def _sources(
    server: Server, endpoints: Sequence[str], silent: Mapping[str, str]
) -> Iterator[Finding]:
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
        if silent[endpoint]:
            fix = f"start the server with {_EVENTS_CONFIG}; vLLM listens only at a *"
            yield problem(subject, silent[endpoint], fix)


def _new_prompt(server: Server, block_size: int) -> list[int]:
    """Return a prompt of more than two blocks, none if the longest one has no block.

    Its tokens are small numbers, which every vocabulary has.

    Args:
        server: that is to compute it.
        block_size: that the router takes it to have.
    """
    own = server.block_size
    length = 2 * max(own or 0, block_size) + 1
    if own is None and server.max_model_len:
        length = max(length, _LARGE_BLOCK + 1)
    if server.max_model_len:
        length = min(length, server.max_model_len - 1)
    if length < (own or 1):
        return []
    draw = random.SystemRandom()
    return [draw.randrange(10, 110) for _ in range(length)]


def _compute(asked: Asked, listener: Listener, probes: Sequence[_Probe]) -> list[Heard]:
    """Have engines compute their prompts; return all that is heard meanwhile."""
    at_once(_Probe.send, probes)
    waited_for = [one for one in probes if one.error is None]

    def note_it(message: Heard) -> bool:
        for probe in waited_for:
            if probe.heard is None and message.begin_of(probe.prompt):
                probe.heard = message
        return all(probe.heard for probe in waited_for)

    return listener.hear(asked.seconds, note_it) if waited_for else []


def _found_of(asked: Asked, probe: _Probe, heard: Sequence[Heard]) -> Iterator[Finding]:
    """Yield what is heard of a request that a server, or a rank of it, serves."""
    server, length = probe.server, len(probe.prompt)
    own = asked.sources[server.url]
    if not length:
        longest, size = server.max_model_len - 1, server.block_size or 1
        yield note(
            probe.subject,
            f"cannot be probed: a prompt of the longest length, {longest} tokens, is "
            f"shorter than a block of {size}",
        )
    elif probe.error is not None:
        told = f"a request of {length} tokens fails: {probe.error}"
        yield problem(probe.subject, told, "see the server's log")
    elif probe.heard is not None:
        yield from _told(asked, probe, probe.heard)
    elif strange := [m for m in heard if m.stored is None and m.endpoint in own]:
        said = f"what comes from {strange[0].endpoint} is no KV event of vLLM's"
        fix = "name the endpoint of --kv-events-config"
        yield problem(probe.subject, said, fix)
    elif server.block_size is None:
        yield note(
            probe.subject,
            f"none came within {asked.seconds:g} s of a request of {length} tokens, of "
            "which there are none if blocks are larger: their size is not told",
            "let the doctor see the server's /metrics",
        )
    else:
        told = f"none came within {asked.seconds:g} s of a request"
        yield problem(probe.subject, told, f"start the server with {_EVENTS_CONFIG}")


def _told(asked: Asked, probe: _Probe, heard: Heard) -> Iterator[Finding]:
    """Yield whether a message that came is one from which the router learns."""
    good = True
    own = asked.sources[probe.server.url]
    expected = own if probe.rank is None else own[probe.rank : probe.rank + 1]
    if heard.endpoint not in expected:
        good = False
        yield problem(
            probe.subject,
            f"come from {heard.endpoint}, and the router hears "
            f"{' and '.join(expected)} for it",
            "order the endpoints of --kv-event-source by rank, each at its server",
        )
    if heard.topic:
        good = False
        yield problem(
            probe.subject,
            f"are published under the topic {heard.topic!r}, and the router hears the "
            "empty one alone",
            'leave "topic" out of the server\'s --kv-events-config',
        )
    event = heard.begin_of(probe.prompt)
    size = asked.block_size if event is None else event.block_size
    if size != asked.block_size:
        good = False
        yield problem(
            probe.subject,
            f"are of blocks of {size} tokens, and the router looks for blocks of "
            f"{asked.block_size}: it finds no prompt",
            f"give the router --kv-event-block-size {size}",
        )
    if good:
        told = f"come from {heard.endpoint}, in blocks of {asked.block_size}"
        yield ok(probe.subject, told)


def prompts_each(engines: int) -> int:
    """Return how many prompts each of several engines is to hold.

    A router that hashes prompts sends one where it is held by a chance of 1 in so many
    engines, on average: so many that it does so with all of them in less than 1 of 100
    cases. An uneven hash does it more seldom, for a product is largest of equal parts.
    """
    each = 1
    while engines ** (engines * each) <= 100:
        each += 1
    return each


def _routing(asked: Asked, listener: Listener, probes: Sequence[_Probe]) -> Finding:
    """Return whether the router sends prompts to where they are cached.

    One that has not cached a prompt tells of its blocks once it is sent there. The
    first is sent twice: a router that takes turns sends it to two engines.

    Args:
        asked: what to look at.
        listener: to all engines.
        probes: one of each engine, computed.
    """
    more = [
        _Probe(one.server, one.rank, _new_prompt(one.server, asked.block_size))
        for one in probes
        for _ in range(prompts_each(len(probes)) - 1)
    ]
    _compute(asked, listener, more)
    if not all(one.heard for one in more):
        return note("routing", "was not looked at: not every event came a second time")
    time.sleep(_SETTLE_SECONDS)
    # One engine after the other, so that taking turns is no luck.
    held = sorted([*probes, *more], key=lambda one: (one.server.url, one.rank or 0))
    for probe in [held[0], *held]:
        try:
            complete(asked.router, probe.server.model, probe.prompt, asked.headers)
        except HttpError as error:
            said = f"a request through the router fails: {error}"
            return problem("routing", said, "see the router's log")
    heard = list(listener.hear(_SETTLE_SECONDS))
    missed = sum(any(one.begin_of(probe.prompt) for one in heard) for probe in held)
    if missed:
        return note(
            "routing",
            f"{missed} of {len(held)} prompts went where they were not cached, by load "
            "or by another policy",
            "look at an idle router with --policy kv_aware",
        )
    return ok("routing", f"{len(held)} of {len(held)} prompts went where they are held")
