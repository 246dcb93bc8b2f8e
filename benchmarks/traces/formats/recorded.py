"""What a server records with ``--radix.record``: how much requests share, and no text.

A request is a line, written when it has ended. ``request`` is its number in order of
arrival, and ``arrival`` is in seconds. ``shared`` tokens at the beginning of its prompt
and answer are those of the request ``of``, on a line before; ``new_ids`` are the token
ids of the rest, which is made up without them. The first line, with
``vllm_radix_trace``, has the version of the format, and the server's settings. A
request without ``cached`` and answer was never admitted, and is not sent. In a closed
loop, one that goes on from an answer waits for it.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, overload

from vllm_radix.record import TRACE_MARK, TRACE_VERSION
from vllm_radix_bench.traces import fields
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, MAX_TOKEN, Line
from vllm_radix_bench.workloads.turn import Turn

_FIRST = 1 << 29
"""Plus its number, the first token that a request brings: no other request has it."""
FILL = _FIRST - 1
"""The others that it brings."""
_MOST = MAX_TOKEN - _FIRST
_LARGEST_ID = (1 << 31) - 1


class RecordedTokens(Sequence[int]):
    """A part of a recorded sequence, its tokens made when they are asked for.

    Args:
        pieces: where each piece of the sequence begins, and its token ids, or, where
            they are to be made up, the number of the request that brought it.
        start: of the part.
        stop: of the part.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[int, int | Sequence[int]]],
        start: int,
        stop: int,
    ) -> None:
        self._pieces = pieces
        self._start = start
        self._stop = stop

    def pieces_before(self, stop: int) -> list[tuple[int, int | Sequence[int]]]:
        """Return the pieces of the sequence that begin before a token."""
        return [piece for piece in self._pieces if piece[0] < stop]

    def part(self, start: int, stop: int) -> "RecordedTokens":
        """Return another part of the sequence."""
        return RecordedTokens(self._pieces, start, stop)

    def _tokens(self) -> list[int]:
        tokens: list[int] = []
        ends = [begin for begin, _ in self._pieces[1:]] + [self._stop]
        for (begin, brought), end in zip(self._pieces, ends, strict=True):
            length = max(0, min(end, self._stop) - begin)
            if isinstance(brought, int):
                tokens += [_FIRST + brought, *[FILL] * (length - 1)][:length]
            else:
                tokens += islice(brought, length)
        return tokens[self._start :]

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._tokens()[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (RecordedTokens, list)):
            return self._tokens() == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._tokens()))


class _Earlier(NamedTuple):
    sequence: RecordedTokens
    input_length: int


def _sequence(
    line: Line, earlier: _Earlier | None, number: int, total: int
) -> RecordedTokens:
    """Return prompt and answer of a request.

    Raises:
        TraceError: what it shares, or brings, does not fit.
    """
    shared, pieces = 0, []
    if earlier is not None:
        most = min(total, len(earlier.sequence))
        shared = line.integer("shared", 1, most)
        pieces = earlier.sequence.pieces_before(shared)
    brought: int | Sequence[int] = number
    if "new_ids" in line and (shared < total or line.fields["new_ids"] != []):
        brought = ids = line.integers("new_ids", _LARGEST_ID)
        if len(ids) != total - shared:
            raise line.error(
                f"new_ids are {len(ids)}",
                f"{total - shared}, one for each token that is not shared",
            )
    if shared < total:
        pieces.append((shared, brought))
    return RecordedTokens(pieces, 0, total)


def _read(line: Line, options: ReadOptions) -> TracedRequest | None:
    RECORDED.check_names(line)
    if TRACE_MARK in line:
        line.integer(TRACE_MARK, 1, TRACE_VERSION)
        line.object("server")
        if "request" not in line:
            return None
    number = line.integer("request", 0, _MOST)
    length = line.integer("input_length", 1, MAX_TOKEN)
    generated = line.integer("output_length", 0, MAX_OUTPUT_LENGTH)
    at = line.seconds("arrival", "seconds")
    if "cached" in line:
        line.integer("cached", 0, length)
    total, follows, earlier = length + generated, None, None
    if "of" in line or "shared" in line:
        of = line.integer("of", 0, _MOST)
        earlier = options.earlier.get(of)
        if earlier is None:
            raise line.wrong("of", "a request of a line before")
    sequence = _sequence(line, earlier, number, total)
    options.earlier[number] = _Earlier(sequence, length)
    if earlier is not None:
        shared = min(line.fields["shared"], length)
        follows = str(of) if shared > earlier.input_length else None
    turn = Turn(sequence.part(0, length), max(1, generated))
    if generated:
        turn.answer = sequence.part(length, total)
    fields.set_request_fields(line, turn)
    if not generated and "cached" not in line:
        return None
    return TracedRequest(turn, at, place=number, id=str(number), follows=follows)


RECORDED = TraceFormat(
    name="recorded",
    about=__doc__,
    fields=(
        TRACE_MARK,
        "server",
        "request",
        "arrival",
        "input_length",
        "output_length",
        "of",
        "shared",
        "new_ids",
        "cached",
        *fields.OF_A_REQUEST,
    ),
    marks=(TRACE_MARK, "request"),
    read=_read,
    ignored=("ended", "dropped"),
    id_field="request",
)
