"""How many other blocks were touched since a block was: Mattson's stack distance.

A cache that evicts the least recently used block holds exactly those blocks since whose
last touch fewer others were touched than it has room for (Mattson et al., "Evaluation
techniques for storage hierarchies", 1970). So what it would find can be counted beside
any other cache, without keeping its blocks.
"""

_CHUNK_BITS = 6
_CHUNK = 1 << _CHUNK_BITS
_INSIDE = _CHUNK - 1
_MIN_SLOTS = _CHUNK * _CHUNK
_MAX_SLOTS = 1 << 16
"""Times further back than that are forgotten, whatever was touched since."""


class StackDistances:
    """Counts blocks by the time of their last touch, in sums of sums.

    A slot is a time, and 64 slots have a sum: an update is two additions, a question
    two short sums, which in Python is faster than the logarithm of a Fenwick tree. The
    end of the cache in question is a slot that moves with what is touched.

    Attributes:
        capacity: blocks of the cache in question: what lies beyond is forgotten.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._base = 0
        self._slots = [0] * _MIN_SLOTS
        self._sums = [0] * (_MIN_SLOTS >> _CHUNK_BITS)
        # The cache ended in this slot when that was last asked for, and from it on
        # there are so many blocks.
        self._end = 0
        self._since_end = 0

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
        if at >= self._end:
            self._since_end += blocks

    def room_at(self, clock: int) -> int | None:
        """Return for how many of the blocks touched at a time there is room: as O(1).

        0 or less for none, as beyond the horizon; None for all. Only of the time just
        after the horizon a cache holds a part.
        """
        end, at = self._move_end(), clock - self._base
        if at > end:
            return None
        since = self._since_end - self._slots[end] if at == end else self._since_end
        return self.capacity - since

    def horizon(self) -> int:
        """Return the last time of which the cache would hold nothing any more.

        O(times by which it has moved since it was last asked for), and no more than
        O(64 + slots / 64).
        """
        return self._base + self._move_end() - 1

    def _move_end(self) -> int:
        """Find the last slot since which a whole cache was touched, or 0."""
        slots, sums, room = self._slots, self._sums, self.capacity
        end, since = self._end, self._since_end
        while end and since < room:
            chunk = (end - 1) >> _CHUNK_BITS
            if not end & _INSIDE and since + sums[chunk] < room:
                end -= _CHUNK
                since += sums[chunk]
            else:
                end -= 1
                since += slots[end]
        while end < len(slots) and since - slots[end] >= room:
            chunk = end >> _CHUNK_BITS
            if not end & _INSIDE and since - sums[chunk] >= room:
                end += _CHUNK
                since -= sums[chunk]
            else:
                since -= slots[end]
                end += 1
        self._end, self._since_end = end, since
        return end

    def _make_room(self) -> None:
        """Forget the older half of the times, or keep twice as many."""
        half = len(self._slots) // 2
        chunks = half >> _CHUNK_BITS
        is_long = len(self._slots) >= _MAX_SLOTS
        if is_long or sum(self._sums[chunks:]) >= self.capacity:
            self._base += half
            self._slots = self._slots[half:] + [0] * half
            self._sums = self._sums[chunks:] + [0] * chunks
            self._end = max(0, self._end - half)
            self._since_end = sum(self._slots[self._end :])
        else:
            self._slots += [0] * len(self._slots)
            self._sums += [0] * len(self._sums)
