"""What was evicted and may come back: packed, for it is more than what is cached."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

_MIN_SIZE = 64
_NONE = -1


class Ghost(NamedTuple):
    """A run of evicted blocks.

    Attributes:
        blocks: how many.
        label: the class that they had.
        uses: how many requests had used them.
        clock: when they were released.
    """

    blocks: int
    label: int
    uses: int
    clock: int


class Ghosts:
    """A queue of evicted runs that finds them by their key as well.

    A ring of arrays, 18 bytes a run and 4 of a hash table with chains; 44 at most after
    it was doubled. Runs that were taken out leave a gap until their turn comes, or the
    ring is full.

    Attributes:
        blocks: of all runs.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._start_with(_MIN_SIZE)

    def _start_with(self, size: int) -> None:
        """Start with an empty ring of a size, a power of two."""
        self._mask = size - 1
        self._keys = array("I", bytes(4 * size))
        self._blocks = array("I", bytes(4 * size))
        self._clocks = array("I", bytes(4 * size))
        self._labels = bytearray(size)
        self._uses = bytearray(size)
        self._next = array("i", [_NONE]) * size
        self._heads = array("i", [_NONE]) * size
        self._first = 0
        self._end = 0
        self._count = 0

    def __len__(self) -> int:
        """Return the number of runs."""
        return self._count

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        arrays = self._keys, self._blocks, self._clocks, self._next, self._heads
        return sum(len(a) * a.itemsize for a in arrays) + 2 * len(self._labels)

    def push(self, key: int, ghost: Ghost) -> None:
        """Add a run, the last to be forgotten. O(1), amortised.

        Now and then it makes room: milliseconds for 100,000 runs.

        Args:
            key: 32 bits that stand for its first block and all before it.
            ghost: the run.
        """
        if self._end - self._first > self._mask:
            self._make_room()
        at = self._end & self._mask
        self._end += 1
        self._keys[at] = key
        self._blocks[at], self._labels[at], self._uses[at], self._clocks[at] = ghost
        self._next[at] = self._heads[key & self._mask]
        self._heads[key & self._mask] = at
        self._count += 1
        self.blocks += ghost.blocks

    def pop(self, key: int) -> Ghost | None:
        """Take out the run that begins with a key, the last one added. O(1)."""
        keys, at = self._keys, self._heads[key & self._mask]
        while at != _NONE and keys[at] != key:
            at = self._next[at]
        return None if at == _NONE else self._take(at)

    def expire(self, most: int) -> Iterator[Ghost]:
        """Take out the oldest runs until ``most`` blocks are left, or fewer. O(1) each.

        Args:
            most: blocks to keep.
        """
        while self.blocks > most:
            at = self._first & self._mask
            if self._blocks[at]:
                yield self._take(at)
            else:
                self._first += 1

    def _take(self, at: int) -> Ghost:
        ghost = Ghost(
            self._blocks[at], self._labels[at], self._uses[at], self._clocks[at]
        )
        self._unlink(at)
        self._blocks[at] = 0
        self._count -= 1
        self.blocks -= ghost.blocks
        return ghost

    def _unlink(self, at: int) -> None:
        head, following = self._keys[at] & self._mask, self._next
        if self._heads[head] == at:
            self._heads[head] = following[at]
            return
        before = self._heads[head]
        while following[before] != at:
            before = following[before]
        following[before] = following[at]

    def _make_room(self) -> None:
        """Close the gaps of a full ring; double it if they are few.

        O(size log size), in numpy: imported as late as that of the densities.
        """
        import numpy as np

        before, blocks = self._columns(), self.blocks
        at = np.arange(self._first, self._end) & self._mask
        at = at[np.asarray(before[0])[at] > 0]
        size, count = self._mask + 1, len(at)
        self._start_with(2 * size if count > size // 4 * 3 else size)
        self.blocks, self._end, self._count = blocks, count, count
        for old, new in zip(before, self._columns(), strict=True):
            np.asarray(new)[:count] = np.asarray(old)[at]
        # Chains: each run comes before the one pushed before it.
        chain = np.frombuffer(self._keys, np.uint32)[:count] & self._mask
        order = np.argsort(chain, kind="stable")
        follows = chain[order[1:]] == chain[order[:-1]]
        following = np.frombuffer(self._next, np.int32)
        following[order[1:][follows]] = order[:-1][follows]
        np.frombuffer(self._heads, np.int32)[chain] = np.arange(count)

    def _columns(self) -> list[memoryview]:
        """Return what is kept of each run, the number of its blocks first."""
        columns = self._blocks, self._keys, self._clocks, self._labels, self._uses
        return [memoryview(column) for column in columns]
