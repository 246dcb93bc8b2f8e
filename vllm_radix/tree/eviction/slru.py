"""Segmented least recently used."""

from vllm_radix.tree.eviction.base import NEVER, EvictionPolicy, Queues, register

_PROTECTED = 0.8


@register
class SegmentedLRU(EvictionPolicy):
    """Evicts what was used once, unless that leaves too much of the rest.

    Blocks that one request has used are on probation, all others are protected. The
    oldest block on probation goes, or the oldest protected one while these are more
    than 80 % of all. In the original (Karedla et al., 1994) that one gets another time
    on probation, at its young end; here it goes, for classes change at releases only.
    """

    name = "slru"
    num_classes = 2

    def label(self, uses: int, output_tokens: int, new_tokens: int) -> int:
        """Return 0 on probation, 1 if protected. O(1)."""
        return int(uses > 1)

    def pick(self, queues: Queues) -> int:
        """Return the segment that gives a block. O(1)."""
        probation, protected = queues.blocks
        return pick_of_two(queues, protected <= _PROTECTED * (probation + protected))


def pick_of_two(queues: Queues, first: bool) -> int:
    """Return class 0 if ``first``, else 1; the other if that has no block. O(1)."""
    wanted = int(not first)
    return wanted if queues.ranks[wanted] != NEVER else 1 - wanted
