"""How many other blocks were touched since a block was: Mattson's stack distance.

A cache that evicts the least recently used block holds exactly those blocks since whose
last touch fewer others were touched than it has room for (Mattson et al., "Evaluation
techniques for storage hierarchies", 1970). So what it would find can be counted beside
any other cache, without keeping its blocks.
"""

_CHUNK_BITS = 6
_CHUNK = 1 << _CHUNK_BITS
_MIN_SLOTS = _CHUNK * _CHUNK
_MAX_SLOTS = 1 << 16
"""Times further back than that are forgotten, whatever was touched since."""


class StackDistances:
    """Counts blocks by the time of their last touch, in sums of sums.

    A slot is a time, and 64 slots have a sum: an update is two additions, a question
    two short sums, which in Python is faster than the logarithm of a Fenwick tree.

    Attributes:
        capacity: blocks of the cache in question: what lies beyond is forgotten.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._base = 0
        self._slots = [0] * _MIN_SLOTS
        self._sums = [0] * (_MIN_SLOTS >> _CHUNK_BITS)

    def __len__(self) -> int:
        """Return the number of times that are told apart."""
        return len(self._slots)

    def add(self, clock: int, blocks: int) -> None:
        """Count blocks that were touched at a time: O(1), amortised.

        Args:
            clock: the time; times that are long forgotten are left alone.
            blocks: how many; negative for those that are touched again.
        """
        at = clock - self._base
        if at < 0 or not blocks:
            return
        while at >= len(self._slots):
            self._make_room()
            at = clock - self._base
        self._slots[at] += blocks
        self._sums[at >> _CHUNK_BITS] += blocks

    def after(self, clock: int) -> int:
        """Return how many blocks were touched after a time: O(64 + slots / 64)."""
        at = max(0, clock - self._base + 1)
        chunk = (at + _CHUNK - 1) >> _CHUNK_BITS
        there = sum(self._slots[at : chunk << _CHUNK_BITS])
        return there + sum(self._sums[chunk:])

    def horizon(self, room: int) -> int:
        """Return the last time of which a cache would hold nothing any more.

        O(64 + slots / 64).

        Args:
            room: blocks of the cache.
        """
        at, left = len(self._sums), room
        while at and self._sums[at - 1] < left:
            at -= 1
            left -= self._sums[at]
        if not at:
            return self._base - 1
        slot = at << _CHUNK_BITS
        while self._slots[slot - 1] < left:
            slot -= 1
            left -= self._slots[slot]
        return self._base + slot - 2

    def _make_room(self) -> None:
        """Forget the older half of the times, or keep twice as many."""
        half = len(self._slots) // 2
        chunks = half >> _CHUNK_BITS
        is_long = len(self._slots) >= _MAX_SLOTS
        if is_long or sum(self._sums[chunks:]) >= self.capacity:
            self._base += half
            self._slots = self._slots[half:] + [0] * half
            self._sums = self._sums[chunks:] + [0] * chunks
        else:
            self._slots += [0] * len(self._slots)
            self._sums += [0] * len(self._sums)
