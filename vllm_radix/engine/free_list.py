"""What vLLM's list of free blocks and a tree have to tell each other."""

from collections import Counter
from collections.abc import Iterable, Sequence

from vllm_radix.engine.compat import BlockHashWithGroupId, BlockPool, KVCacheBlock


def make_marks(num_blocks: int) -> list[BlockHashWithGroupId]:
    """Return a mark for each block, to carry in place of a hash while it is cached.

    Unlike each other; 4 bytes at the end are a group, as in vLLM's hashes.
    """
    return [
        BlockHashWithGroupId(b"radix " + i.to_bytes(8, "big") + bytes(4))
        for i in range(num_blocks)
    ]


def put_first(pool: BlockPool, block_ids: Iterable[int]) -> None:
    """Move free blocks to the head of the list, to be reused in this order."""
    queue = pool.free_block_queue
    blocks = [pool.blocks[block_id] for block_id in block_ids]
    for block in blocks:
        queue.remove(block)
    queue.prepend_n(blocks)


def ids_to_be_free(pool: BlockPool, blocks: Sequence[KVCacheBlock]) -> list[int]:
    """Return the blocks that no request uses any more once these are let go of."""
    free = [
        block.block_id
        for block in blocks
        if block.ref_cnt == 1 and block.pool is pool and not block.is_null
    ]
    shared = [block for block in blocks if block.ref_cnt > 1]
    if shared:
        # The source of several copies is let go several times at once.
        again = Counter(block.block_id for block in shared)
        free += [i for i, n in again.items() if n == pool.blocks[i].ref_cnt]
    return free
