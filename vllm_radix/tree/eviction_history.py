"""What was evicted from where, to tell an evicted prefix from an unseen one."""

from collections import OrderedDict
from collections.abc import Hashable

_CAPACITY = 4096
_FOLLOWERS = 16


class EvictionHistory:
    """Remembers which blocks used to follow those that are still cached.

    Only the uppermost block of what was evicted is kept, which is the first one
    that a request misses; what followed a block is forgotten with the block. So
    an answer is never wrong, and a missing one means unknown.

    Args:
        capacity: cached blocks and roots for which up to 16 followers each are
            remembered; those noted longest ago are forgotten first.

    Attributes:
        now: the time that evictions are stamped with, set by the caller.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self.now = 0.0
        self._capacity = capacity
        self._after: OrderedDict[Hashable, dict[bytes, float]] = OrderedDict()

    def note(self, parent: Hashable, tokens: bytes) -> None:
        """Remember that the block ``tokens`` after ``parent`` is evicted. O(1)."""
        followers = self._after.setdefault(parent, {})
        followers[tokens] = self.now
        if len(followers) > _FOLLOWERS:
            del followers[next(iter(followers))]
        self._after.move_to_end(parent)
        if len(self._after) > self._capacity:
            self._after.popitem(last=False)

    def forget(self, parent: Hashable) -> None:
        """Forget what followed ``parent``, O(1)."""
        self._after.pop(parent, None)

    def evicted_at(self, parent: Hashable, tokens: bytes) -> float | None:
        """Return when the block ``tokens`` after ``parent`` was evicted. O(1)."""
        return self._after.get(parent, {}).get(tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._after.clear()
