"""Mooncake's format: lengths, and an id for each 512 tokens of a prompt.

Equal ids mean equal prefixes. From these, prompts are made up that share what the ids
share.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from vllm_radix_bench.traces.format import TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, MAX_TOKEN, Line
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn

HASHED_TOKENS = 512
"""Tokens of a prompt that an id stands for."""

_FILL = 1
"""Token of a made-up block, but for its first."""

_FIRST = 1000
"""First token of the made-up block whose id is 0; others count up from it."""


class HashedPrompt(Sequence[int]):
    """A made-up prompt, equal to another's as far as their ids are.

    Keeps a number for each block and makes the tokens when they are asked for:
    a trace of a hundred million tokens takes a few megabytes.

    Args:
        hash_ids: of the blocks, up to ``MAX_TOKEN - 1000``.
        length: tokens of the prompt; the last block may be shorter than the others.
    """

    __slots__ = ("_firsts", "_length")

    def __init__(self, hash_ids: Iterable[int], length: int) -> None:
        self._firsts = array("i", (_FIRST + one for one in hash_ids))
        self._length = length

    def _tokens(self) -> list[int]:
        tokens = [_FILL] * self._length
        tokens[::HASHED_TOKENS] = self._firsts
        return tokens

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._tokens()[index]
        block, inside = divmod(range(self._length)[index], HASHED_TOKENS)
        return _FILL if inside else self._firsts[block]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, HashedPrompt):
            return self._length == other._length and self._firsts == other._firsts
        if isinstance(other, list):
            return self._tokens() == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self._length, self._firsts.tobytes()))

    def __repr__(self) -> str:
        return f"HashedPrompt({len(self._firsts)} blocks, {self._length} tokens)"


def _read(line: Line, encode: Encode) -> TracedRequest:
    line.check_names(MOONCAKE.fields)
    ids = line.integers("hash_ids", MAX_TOKEN - _FIRST)
    most = len(ids) * HASHED_TOKENS
    length = line.integer("input_length", 1, MAX_TOKEN)
    if not most - HASHED_TOKENS < length <= most:
        raise line.error(
            f"input_length is {length} with {len(ids)} hash_ids",
            f"{most - HASHED_TOKENS + 1} to {most}, one id for each "
            f"{HASHED_TOKENS} tokens",
        )
    output = line.integer("output_length", 1, MAX_OUTPUT_LENGTH)
    at = line.seconds("timestamp", "milliseconds")
    return TracedRequest(at, 1000, None, Turn(HashedPrompt(ids, length), output))


MOONCAKE = TraceFormat(
    name="mooncake",
    fields=("timestamp", "input_length", "output_length", "hash_ids"),
    marks=("hash_ids",),
    read=_read,
)
