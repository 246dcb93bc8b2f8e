"""What block pools over a tree have in common, whatever tree it is."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_radix.engine.compat import BlockPool, KVCacheBlock
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.metrics.tally import Tally
from vllm_radix.tree import RadixTree
from vllm_radix.tree.resume import ResumeTree


class TreeBlockPool(BlockPool):
    """A ``BlockPool`` whose prefix cache is a tree, which says what is evicted.

    Attributes:
        tree: the prefix cache.
        keys: the keys of requests in it.
        tally: counts what is evicted.
        mirror: whether vLLM's map of hashes is kept beside the tree.
    """

    tree: RadixTree | ResumeTree
    keys: RequestKeys
    tally: Tally
    mirror: bool

    @staticmethod
    def check_unused(pool: BlockPool) -> None:
        """Check that a pool may be turned into one over a tree.

        Raises:
            RuntimeError: blocks are in use or cached already.
        """
        used = pool.num_gpu_blocks - pool.get_num_free_blocks()
        if used != 1 or len(pool.cached_block_hash_to_block):
            raise RuntimeError("radix: the block pool is in use already")

    @property
    def num_blank_blocks(self) -> int:
        """Free blocks that hold nothing cached."""
        return self.free_block_queue.num_free_blocks - self.tree.num_idle

    @abstractmethod
    def new_step_starts(self) -> None:
        """Note that what the step before was to write is written by now."""

    # -- what vLLM calls -------------------------------------------------------

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blank blocks, then what the tree lets go of."""
        if num_blocks <= self.free_block_queue.num_free_blocks:
            blank = self.num_blank_blocks
            if num_blocks > blank:
                evicted = self.tree.evict(num_blocks - blank)
                self.tally.note_evicted(evicted)
                self._put_next(evicted, blank)
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

    # -- between tree and list -------------------------------------------------

    @abstractmethod
    def _put_next(self, block_ids: list[int], blank: int) -> None:
        """Move free blocks that went blank to where they are reused soon.

        Args:
            block_ids: what the tree let go of.
            blank: how many free blocks were blank before.
        """

    @abstractmethod
    def _release(self, blocks: list[KVCacheBlock]) -> None:
        """Tell the tree which of the blocks no request will use any more."""

    # -- proof -----------------------------------------------------------------

    def _check_free_list(self) -> set[int]:
        """Return the free blocks, which are those that no request holds.

        Raises:
            AssertionError: they are not.
        """
        free = {block.block_id for block in self.free_block_queue.get_all_free_blocks()}
        assert len(free) == self.get_num_free_blocks(), "the free list is miscounted"
        for block in self.blocks:
            if not block.is_null:
                is_free = block.block_id in free
                assert is_free == (block.ref_cnt == 0), f"{block!r} is misfiled"
        return free
