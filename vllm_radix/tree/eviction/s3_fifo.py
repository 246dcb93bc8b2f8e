"""A small queue for newcomers, and a main one."""

from vllm_radix.tree.eviction.base import EvictionPolicy, Queues, register
from vllm_radix.tree.eviction.slru import pick_of_two

_SMALL = 0.1


@register
class S3FIFO(EvictionPolicy):
    """Keeps newcomers in a tenth of the cache until they are used again.

    Blocks that were never used before, as far as is remembered, are in the small queue,
    all others in the main one; that goes for blocks that come back after they were
    evicted. The small queue gives its oldest block while it is more than a tenth.

    After S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction",
    2023). There queues are in order of arrival, and a use saves a block when its turn
    comes; here they are in order of release, so that no block outlives one before it.
    """

    name = "s3-fifo"
    num_classes = 2
    ghosts = 1

    def label(self, uses: int, output_tokens: int, new_tokens: int) -> int:
        """Return 0 for the small queue, 1 for the main one. O(1)."""
        return int(uses > 1)

    def pick(self, queues: Queues) -> int:
        """Return the queue that gives a block. O(1)."""
        small, main = queues.blocks
        return pick_of_two(queues, small > _SMALL * (small + main))
