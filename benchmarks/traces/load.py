"""Reads a trace: a file of JSON lines, a request in each."""

import math
from pathlib import Path

from vllm_radix_bench.traces.format import (
    DEFAULT_OUTPUT_LENGTH,
    ReadOptions,
    TracedRequest,
    TraceFormat,
)
from vllm_radix_bench.traces.formats import format_of
from vllm_radix_bench.traces.line import TraceError
from vllm_radix_bench.traces.source import lines_of
from vllm_radix_bench.workloads.encoders import Encode, EncodeChat
from vllm_radix_bench.workloads.turn import Turn


def _read(path: Path, options: ReadOptions, limit: int | None) -> list[TracedRequest]:
    """Return the requests of a file, in its order.

    Raises:
        TraceError: it cannot be read, or a line is wrong.
    """
    requests: list[TracedRequest] = []
    first: TraceFormat | None = None
    ids: set[str] = set()
    for line in lines_of(path):
        this = format_of(line)
        first = first or this
        if this is not first:
            raise line.error(
                f"the format is {this.name}, that of the first line is {first.name}",
                "one format in a file",
            )
        request = this.read(line, options)
        if request is None:
            continue
        if request.id is not None:
            if request.id in ids:
                raise line.wrong(this.id_field, "one that no earlier line has")
            ids.add(request.id)
        requests.append(request)
        if len(requests) == limit:
            break
    if not requests:
        raise TraceError(
            f"{path}: holds no request; allowed: JSON lines, a request in each"
        )
    return requests


def _set_missing_times(requests: list[TracedRequest]) -> None:
    """Give requests without a time that of the line before.

    Those before the first time in the file have that one; without any, all stay at 0.
    """
    latest = next((one for one in requests if one.timed and one.at is not None), None)
    for request in requests:
        if latest is not None and not request.timed:
            request.at, request.units = latest.at, latest.units
        elif request.at is not None:
            latest = request


def _in_order(requests: list[TracedRequest], rate: float) -> list[TracedRequest]:
    """Set arrivals and delays, and return requests in order of arrival.

    One without a time stands at that of the one before it in its session.
    """
    start = min((one.at for one in requests if one.at is not None), default=0.0)
    latest: dict[str | None, float] = {}
    times = []
    for number, request in enumerate(requests):
        at = latest.get(request.session, start) if request.at is None else request.at
        latest[request.session] = at
        times.append((at, request.place, number))
        request.turn.delay /= rate
        if request.at is not None:
            request.turn.delay = 0.0
            request.turn.arrival = (at - start) / request.units / rate
    return [requests[number] for *_, number in sorted(times)]


def _link(requests: list[TracedRequest], closed_loop: bool) -> list[Turn]:
    """Make requests the children of those whose answers they wait for.

    Returns:
        Those that wait for none.
    """
    roots: list[Turn] = []
    named: dict[str, TracedRequest] = {}
    sessions: dict[str, list[TracedRequest]] = {}
    for request in requests:
        turn, before, adds = request.turn, None, False
        if request.follows is not None:
            before = named.get(request.follows)
        if request.id is not None:
            named[request.id] = request
        if request.session is not None:
            earlier = sessions.setdefault(request.session, [])
            if earlier:
                before = earlier[-1]
                begins = earlier[0].turn.tokens[0]
                adds = request.may_add and turn.tokens[0] != begins
            # Of a session, the first and the latest matter.
            earlier[1:] = [request]
        if before is not None and (closed_loop or adds or request.at is None):
            # Else the trace's prompt holds the answer that was given then.
            turn.whole = not adds
            before.turn.children.append(turn)
        else:
            # There is no answer that it could come after.
            turn.delay = 0.0
            roots.append(turn)
    return roots


def load(
    path: Path,
    encode: Encode,
    *,
    encode_chat: EncodeChat | None = None,
    output_length: int = DEFAULT_OUTPUT_LENGTH,
    closed_loop: bool = False,
    limit: int | None = None,
    rate: float = 1.0,
) -> list[Turn]:
    """Read a trace.

    The format is that of the first line, one of ``formats``. Blank lines are skipped;
    files packed with gzip and UTF-8's byte order mark are read.

    In a closed loop a request of a session is sent at its time, but not before the
    one before it is answered. Its prompt is still the whole one of the trace: it
    goes on with the answer given then, not with the one of the replay. Without,
    sessions do not matter and everything is sent at its time. In both, a request that
    has no time of its own, or adds to its session, waits for the answer before it.

    Args:
        path: of the file.
        encode: text to token ids, without special tokens.
        encode_chat: messages to the token ids of a prompt.
        output_length: of requests whose line names none.
        closed_loop: whether requests of a session wait for each other.
        limit: read the first ``limit`` requests of the file only.
        rate: send this many times as fast.

    Returns:
        Requests in order of arrival, those of the same time in that of the file; the
        first arrives at 0. Those that wait for another's answer are its descendants.

    Raises:
        TraceError: the file or an argument is wrong; nothing is returned.
    """
    if not 0 < rate < math.inf:
        raise TraceError(f"rate is {rate}; allowed: a finite number above 0")
    if limit is not None and limit < 1:
        raise TraceError(f"limit is {limit}; allowed: an integer of at least 1")
    requests = _read(path, ReadOptions(encode, encode_chat, output_length), limit)
    _set_missing_times(requests)
    if len({one.units for one in requests if one.at}) > 1:
        raise TraceError(
            f"{path}: times are in seconds in some lines and in milliseconds in "
            "others; allowed: one of them in a file"
        )
    if closed_loop and all(one.session is one.id is None for one in requests):
        raise TraceError(
            f"{path}: session is missing in every line read, and a closed loop needs "
            "it; allowed: a string, in formats that have it"
        )
    requests = _in_order(requests, rate)
    if any(math.isinf(one.turn.arrival + one.turn.delay) for one in requests):
        raise TraceError(
            f"rate is {rate}: the last request would never be sent; allowed: more"
        )
    return _link(requests, closed_loop)
