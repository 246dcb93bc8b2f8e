"""Reads a trace: a file of JSON lines, a request in each."""

import math
from pathlib import Path

from vllm_radix_bench.traces.format import TracedRequest, TraceFormat
from vllm_radix_bench.traces.formats import format_of
from vllm_radix_bench.traces.line import Line, TraceError
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn


def _read(path: Path, encode: Encode, limit: int | None) -> list[TracedRequest]:
    """Return the requests of a file, in its order.

    Raises:
        TraceError: it cannot be read, or a line is wrong.
    """
    requests: list[TracedRequest] = []
    first: TraceFormat | None = None
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                line = Line(f"{path}, line {number}", raw)
                this = format_of(line)
                first = first or this
                if this is not first:
                    raise line.error(
                        f"the format is {this.name}, that of the first line is "
                        f"{first.name}",
                        "one format in a file",
                    )
                requests.append(this.read(line, encode))
                if len(requests) == limit:
                    break
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read ({error.strerror or error}); allowed: a file of "
            "JSON lines"
        ) from error
    if not requests:
        raise TraceError(
            f"{path}: holds no request; allowed: JSON lines, a request in each"
        )
    return requests


def _chain(path: Path, requests: list[TracedRequest]) -> list[Turn]:
    """Make each request the child of the one before it in its session.

    Returns:
        The first of each session, and all without one.

    Raises:
        TraceError: there is no session.
    """
    roots: list[Turn] = []
    last: dict[str, Turn] = {}
    for request in requests:
        turn, session = request.turn, request.session
        if session is None or session not in last:
            roots.append(turn)
        else:
            # The trace's prompt holds the answer that was given then.
            turn.whole = True
            last[session].children.append(turn)
        if session is not None:
            last[session] = turn
    if not last:
        raise TraceError(
            f"{path}: session is missing in every line read, and a closed loop needs "
            "it; allowed: a string, in lines with prompt or token_ids"
        )
    return roots


def load(
    path: Path,
    encode: Encode,
    *,
    closed_loop: bool = False,
    limit: int | None = None,
    rate: float = 1.0,
) -> list[Turn]:
    """Read a trace.

    The format is that of the first line, one of ``formats``. Blank lines are skipped.

    In a closed loop a request of a session is sent at its time, but not before the
    one before it is answered. Its prompt is still the whole one of the trace: it
    goes on with the answer given then, not with the one of the replay. Without,
    sessions do not matter and everything is sent at its time.

    Args:
        path: of the file.
        encode: text to token ids, without special tokens.
        closed_loop: whether requests of a session wait for each other.
        limit: read the first ``limit`` requests of the file only.
        rate: send this many times as fast.

    Returns:
        Requests in order of arrival, those of the same time in that of the file; the
        first arrives at 0. In a closed loop, the first of each session, with the
        others as its descendants, and all requests without one.

    Raises:
        TraceError: the file or an argument is wrong; nothing is returned.
    """
    if not 0 < rate < math.inf:
        raise TraceError(f"rate is {rate}; allowed: a finite number above 0")
    if limit is not None and limit < 1:
        raise TraceError(f"limit is {limit}; allowed: an integer of at least 1")
    requests = _read(path, encode, limit)
    requests.sort(key=lambda request: request.at)
    start = requests[0].at
    for request in requests:
        request.turn.arrival = (request.at - start) / request.units / rate
    if math.isinf(requests[-1].turn.arrival):
        raise TraceError(
            f"rate is {rate}: the last request would never be sent; allowed: more"
        )
    if closed_loop:
        return _chain(path, requests)
    return [request.turn for request in requests]
