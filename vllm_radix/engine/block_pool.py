"""The block pool: vLLM's own, with the radix tree as its prefix cache.

The tree decides which blocks are found and which go first; this class executes
it on vLLM's blocks. Reference counts, the free list, the hashes that KV events
and connectors read, metrics and events stay vLLM's.

The free list stays a true linked list with an exact length, in two parts::

    head [ blank blocks | cached, idle blocks ] tail
           reused first   reused when the tree says so

Blocks let go with ``unpin_blocks`` (HiSparse) are the exception vLLM makes: blank
ones among them stay at the tail, to be reused last.
"""

from collections.abc import Iterable, Sequence
from typing import Any, overload

from vllm_radix.engine.compat import BlockPool, KVCacheBlock, Request
from vllm_radix.engine.keys import RequestKeys
from vllm_radix.tree import LRU, EvictionPolicy, RadixTree


class _Ids(Sequence[int]):
    """The ids of the first blocks of a request, read only where they are used.

    A request that fills one more block would else pay for its whole length.
    """

    def __init__(self, blocks: list[KVCacheBlock], count: int) -> None:
        self._blocks = blocks
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, int):
            return self._blocks[index].block_id
        start, stop, step = index.indices(self._count)
        return [self._blocks[i].block_id for i in range(start, stop, step)]


class RadixBlockPool(BlockPool):
    """A ``BlockPool`` whose prefix cache is a radix tree.

    Takes vLLM's arguments. ``adopt`` turns an existing pool into one instead:
    vLLM builds its pool deep inside, and everything binds to that object.

    Attributes:
        tree: the prefix cache.
        keys: the keys of requests in it.
    """

    tree: RadixTree
    keys: RequestKeys

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plant(LRU())

    @classmethod
    def adopt(cls, pool: BlockPool, policy: EvictionPolicy) -> "RadixBlockPool":
        """Turn an unused pool into a radix pool, in place.

        Raises:
            RuntimeError: blocks are in use or cached already.
        """
        used = pool.num_gpu_blocks - pool.get_num_free_blocks()
        if used != 1 or len(pool.cached_block_hash_to_block):
            raise RuntimeError("radix: the block pool is in use already")
        pool.__class__ = cls
        pool._plant(policy)
        return pool

    def _plant(self, policy: EvictionPolicy) -> None:
        self.tree = RadixTree(self.hash_block_size, policy)
        self.keys = RequestKeys(self.hash_block_size)

    # -- reading ---------------------------------------------------------------

    def match(self, request: Request, max_blocks: int) -> list[KVCacheBlock]:
        """Return the longest cached prefix of a request, in blocks."""
        found = self.tree.match(
            self.keys.key(request, max_blocks),
            self.keys.namespace(request),
            limit=max_blocks,
        )
        blocks = self.blocks
        return [blocks[block_id] for block_id in found.blocks]

    @property
    def num_blank_blocks(self) -> int:
        """Free blocks that hold nothing cached."""
        return self.get_num_free_blocks() - self.tree.stats().idle_blocks

    # -- what vLLM calls -------------------------------------------------------

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Publish a request's blocks: to the tree, and to vLLM's own map."""
        if num_cached_blocks >= num_full_blocks:
            return
        super().cache_full_blocks(
            request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs
        )
        freed = self.tree.insert(
            self.keys.key(request, num_full_blocks),
            _Ids(blocks, num_full_blocks),
            self.keys.namespace(request),
            start=num_cached_blocks,
        )
        self._retire(freed)
        self._put_first(freed)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blank blocks, then what the tree lets go of."""
        if num_blocks <= self.get_num_free_blocks():
            missing = num_blocks - self.num_blank_blocks
            if missing > 0:
                self._put_first(self.tree.evict(missing))
        # Should the tree fall short, because a cached block is held below an
        # idle one, the list's order decides; vLLM's method says so to the tree.
        return super().get_new_blocks(num_blocks)

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Hold blocks that were hit."""
        self.tree.acquire([block.block_id for block in blocks if not block.ref_cnt])
        super().touch(blocks)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Let go of blocks, the first one to be evicted first."""
        blocks = list(ordered_blocks)
        self._release(blocks)
        super().free_blocks(blocks)

    def unpin_blocks(
        self, blocks: Iterable[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        """Let go of blocks that stay readable until they are reused."""
        blocks = list(blocks)
        self._release(blocks)
        super().unpin_blocks(blocks, *args, **kwargs)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop blocks, duplicates of them and all that is cached below them.

        Called for blocks whose KV failed to load. What was computed from them
        is as wrong as they are, and would be found again once somebody has
        computed the prefix anew.
        """
        doomed = set(block_ids)
        for block_id in block_ids:
            doomed.update(self.tree.below(block_id))
        super().evict_blocks(doomed)
        self._put_first(
            [
                block_id
                for block_id in doomed
                if not self.blocks[block_id].ref_cnt
                and not self.blocks[block_id].is_null
            ]
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, if none is in use."""
        if not super().reset_prefix_cache():
            return False
        self.tree.reset()
        return True

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        evicted = super()._maybe_evict_cached_block(block)
        self.tree.discard(block.block_id)
        return evicted

    # -- between tree and list -------------------------------------------------

    def _release(self, blocks: list[KVCacheBlock]) -> None:
        """Tell the tree which of the blocks nobody will use any more."""
        idle = [
            block.block_id
            for block in blocks
            if block.ref_cnt == 1 and block.pool is self and not block.is_null
        ]
        # Before vLLM files them: without a hash they go to the head.
        self._retire(self.tree.release(idle))

    def _retire(self, block_ids: list[int]) -> None:
        """Take duplicates that went blank out of vLLM's map of hashes.

        Their content is still cached, so a subscriber is told of a removal only
        for hashes that no other block holds.
        """
        for block_id in block_ids:
            block = self.blocks[block_id]
            if self.metrics_collector:
                self.metrics_collector.on_block_evicted(block)
            gone = [
                block_hash
                for block_hash in self._remove_cached_block_hashes(block)
                if self.cached_block_hash_to_block.get_one_block(block_hash) is None
            ]
            self._emit_block_removed_events(gone)

    def _put_first(self, block_ids: list[int]) -> None:
        """Move free blocks to the head of the list, to be reused in this order."""
        queue = self.free_block_queue
        blocks = [self.blocks[block_id] for block_id in block_ids]
        for block in blocks:
            queue.remove(block)
        queue.prepend_n(blocks)

    # -- proof -----------------------------------------------------------------

    def check(self) -> None:
        """Verify the tree, and that pool and tree agree: O(everything).

        Conservation: each block but the null block is free or in use, and the
        tree calls a block idle if and only if it is cached and free.

        Raises:
            AssertionError: an invariant is broken.
        """
        self.tree.check()
        free = {block.block_id for block in self.free_block_queue.get_all_free_blocks()}
        assert len(free) == self.get_num_free_blocks(), "the free list is miscounted"
        idle = 0
        for block in self.blocks:
            if block.is_null:
                continue
            block_id = block.block_id
            assert (block_id in free) == (block.ref_cnt == 0), f"{block!r} is misfiled"
            if self.tree.is_idle(block_id):
                assert block.ref_cnt == 0, f"{block!r} is in use, not idle"
                idle += 1
            elif block_id in self.tree:
                assert block.ref_cnt > 0, f"{block!r} is free, not held"
            assert (block.block_hash is None) == (block_id not in self.tree), (
                f"{block!r}: tree and hashes disagree"
            )
        assert idle == self.tree.stats().idle_blocks
