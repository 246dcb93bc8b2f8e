"""Adaptive replacement."""

from vllm_radix.tree.eviction.base import EvictionPolicy, Queues, register
from vllm_radix.tree.eviction.slru import pick_of_two


@register
class ARC(EvictionPolicy):
    """Divides the cache between blocks used once and others, and learns where.

    If blocks come back that were evicted when they had been used once, those get more
    room; if others do, those do. The target moves by as many blocks as come back, times
    the ratio of what is remembered of both kinds, if that is more than 1.

    After ARC (Megiddo and Modha, 2003). There a hit block moves at once, here when its
    request ends; and all evicted blocks together are remembered in one list.
    """

    name = "arc"
    num_classes = 2
    ghosts = 1

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Give blocks that were used once no room, for a start."""
        self.target = 0.0
        self.remembered = [0, 0]

    def label(self, uses: int, output_tokens: int, new_tokens: int) -> int:
        """Return 0 for blocks that were used once, 1 for others. O(1)."""
        return int(uses > 1)

    def pick(self, queues: Queues) -> int:
        """Return 0 if blocks that were used once have more room than they should. O(1).

        The target is at most all released blocks.
        """
        self.target = min(self.target, float(sum(queues.blocks)))
        return pick_of_two(queues, queues.blocks[0] > self.target)

    def note_evicted(self, label: int, blocks: int) -> None:
        """Count what is remembered."""
        self.remembered[label] += blocks

    def note_unused(self, label: int, age: int, blocks: int) -> None:
        """Count what is remembered no more."""
        self.remembered[label] -= blocks

    def note_reused(self, label: int, age: int, blocks: int, evicted: bool) -> None:
        """Move the target if evicted blocks come back."""
        if not evicted:
            return
        here, other = self.remembered[label], self.remembered[1 - label]
        step = blocks * max(1.0, other / max(1, here))
        self.remembered[label] -= blocks
        self.target = max(0.0, self.target + (step if label == 0 else -step))
