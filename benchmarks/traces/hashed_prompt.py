"""Prompts that are made up from ids of their blocks.

Equal ids mean equal blocks, so that made-up prompts share what those of the trace did.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from vllm_radix_bench.traces.line import MAX_TOKEN, Line

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
        hashed_tokens: tokens that an id stands for.
    """

    __slots__ = ("_firsts", "_length", "_size")

    def __init__(
        self, hash_ids: Iterable[int], length: int, hashed_tokens: int
    ) -> None:
        self._firsts = array("i", (_FIRST + one for one in hash_ids))
        self._length = length
        self._size = hashed_tokens

    @property
    def hashed_tokens(self) -> int:
        """Tokens that an id stands for."""
        return self._size

    @property
    def firsts(self) -> Sequence[int]:
        """First token of each block, equal where ids are."""
        return self._firsts

    def _tokens(self) -> list[int]:
        tokens = [_FILL] * self._length
        tokens[:: self._size] = self._firsts
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
        block, inside = divmod(range(self._length)[index], self._size)
        return _FILL if inside else self._firsts[block]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, HashedPrompt):
            mine = self._size, self._length, self._firsts
            return mine == (other._size, other._length, other._firsts)
        if isinstance(other, list):
            return self._tokens() == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self._size, self._length, self._firsts.tobytes()))

    def __repr__(self) -> str:
        return f"HashedPrompt({len(self._firsts)} blocks, {self._length} tokens)"


def hashed_prompt(line: Line, hashed_tokens: int) -> HashedPrompt:
    """Return the prompt of ``hash_ids`` and ``input_length``.

    Raises:
        TraceError: one of them is wrong, or they do not fit each other.
    """
    ids = line.integers("hash_ids", MAX_TOKEN - _FIRST)
    most = len(ids) * hashed_tokens
    length = line.integer("input_length", 1, MAX_TOKEN)
    if not most - hashed_tokens < length <= most:
        raise line.error(
            f"input_length is {length} with {len(ids)} hash_ids",
            f"{most - hashed_tokens + 1} to {most}, one id for each "
            f"{hashed_tokens} tokens",
        )
    return HashedPrompt(ids, length, hashed_tokens)
