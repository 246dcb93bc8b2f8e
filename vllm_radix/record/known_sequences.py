"""What a sequence of tokens shares with those that were recorded before it."""

from typing import NamedTuple

from vllm_radix.tree import BYTES_PER_TOKEN, Namespace, RadixTree

_BLOCK_SIZE = 256
"""Tokens in a block. Shared tokens are counted inside blocks, too: the size sets only
what a token takes of memory and time, and how many are forgotten at once."""


class Shared(NamedTuple):
    """The longest prefix of a sequence that an earlier one has, too.

    Attributes:
        number: of the earlier sequence; -1 if there is none.
        num_tokens: length of the prefix.
    """

    number: int
    num_tokens: int


class KnownSequences:
    """Sequences in a radix tree of their own, the least recently used forgotten.

    Takes 5 bytes a token, and up to 2 kilobytes a sequence. What is forgotten is
    shared no more.

    Args:
        max_tokens: most tokens that are kept, those that are shared counted once.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_blocks = max(1, max_tokens // _BLOCK_SIZE)
        self.forget_all()

    def forget_all(self) -> None:
        """Begin anew."""
        self._tree = RadixTree(_BLOCK_SIZE)
        # The sequence that brought each block; numbers of blocks are used again.
        self._brought_by: list[int] = []
        self._free: list[int] = []

    def add(self, key: bytes, namespace: Namespace, number: int) -> Shared:
        """Add a sequence; return what it shares with those before it.

        O(its tokens in memcmp, and what is new of it).

        Args:
            key: its tokens; see ``vllm_radix.tree.encode``.
            namespace: sequences of another one share nothing with it.
            number: of the sequence, at least 0.
        """
        tree = self._tree
        found = tree.match(key, namespace, partial=True)
        blocks = list(found.blocks)
        shared, last = len(blocks) * _BLOCK_SIZE, blocks[-1] if blocks else None
        if found.partial is not None:
            shared += found.partial.num_tokens
            last = found.partial.block
            tree.note_hit(last)
        answer = Shared(-1 if last is None else self._brought_by[last], shared)
        tree.acquire(blocks)
        whole, part = divmod(len(key) // BYTES_PER_TOKEN, _BLOCK_SIZE)
        new = self._take(whole - len(blocks) + bool(part), number)
        start = len(blocks)
        blocks += new[: whole - start]
        self._free += tree.insert(key, blocks, namespace, start)
        # A sequence that is too long for all is kept as far as it goes.
        if part and len(new) > whole - start:
            blocks.append(new[-1])
            is_cached, uncached = tree.insert_partial(key, blocks, namespace)
            self._free += uncached
            if not is_cached:
                self._free.append(blocks.pop())
        self._free += tree.release(reversed(blocks))
        return answer

    def _take(self, count: int, number: int) -> list[int]:
        """Return blocks for a sequence: fewer than ``count`` if there are no more."""
        fresh = min(count - len(self._free), self._max_blocks - len(self._brought_by))
        if fresh > 0:
            first = len(self._brought_by)
            self._free += range(first, first + fresh)
            self._brought_by += [number] * fresh
        if count > len(self._free):
            self._free += self._tree.evict(count - len(self._free))
        taken, self._free = self._free[:count], self._free[count:]
        for block in taken:
            self._brought_by[block] = number
        return taken
