"""The block pool of models with several kinds of layers: a tree of resume points.

One pool holds the blocks of all cache groups. The tree decides which are found and
which go; reference counts, the free list, metrics and events stay vLLM's::

    head [ blank blocks | cached, idle blocks ] tail
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_radix.engine.compat import (
    BlockHashWithGroupId,
    BlockPool,
    KVCacheBlock,
    Request,
)
from vllm_radix.engine.free_list import ids_to_be_free, make_marks, put_first
from vllm_radix.engine.point_hint_notes import PointHintNotes
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.tree_pool import TreeBlockPool
from vllm_radix.metrics.tally import Tally
from vllm_radix.tree.resume import Component, Dense, ResumePoint, ResumeTree
from vllm_radix.tree.resume.resume_tree import BlockAt


class HybridBlockPool(TreeBlockPool):
    """A ``BlockPool`` whose prefix cache is a tree of resume points.

    Attributes:
        tree: the prefix cache.
        keys: the keys of requests in it: a letter is a token.
        mirror: whether vLLM's map of hashes is kept beside the tree, for KV events.
            It knows what stock would have cached, and of it what the tree has kept.
        tally: counts of what happens, for metrics.
        moved: copies that vLLM is to make of blocks in this step, by the block's id.
        junctions: returns where a running request leaves points at whole blocks.
        hint_notes: follows the hints of clients, if the scheduler wants that.
        mirror_by_default: keep that map whether or not anybody reads it; for tests.
    """

    tree: ResumeTree
    mirror_by_default = False
    hint_notes: PointHintNotes | None = None

    @classmethod
    def adopt(
        cls, pool: BlockPool, components: Sequence[Component], mirror: bool = False
    ) -> "HybridBlockPool":
        """Turn an unused pool into a hybrid one, in place.

        Args:
            pool: vLLM's.
            components: of the cache groups.
            mirror: keep the map of hashes though nobody reads it.

        Raises:
            RuntimeError: blocks are in use or cached already.
        """
        cls.check_unused(pool)
        pool.__class__ = cls
        pool.tree = ResumeTree(components)
        # A letter is a token: a medium has as many as it has placeholders.
        tokens = pool.num_gpu_blocks * max(c.block_size for c in components)
        pool.keys = RequestKeys(1, tokens)
        events = bool(pool.enable_kv_cache_events)
        pool.mirror = mirror or cls.mirror_by_default or events
        pool.moved = {}
        pool.tally = Tally(pool.num_gpu_blocks)
        pool.junctions = lambda request: ()
        pool._marks = make_marks(pool.num_gpu_blocks)
        # Points whose blocks this step and its copies write.
        pool._being_written = []
        return pool

    moved: dict[int, KVCacheBlock]
    junctions: Callable[[Request], Sequence[int]]
    _being_written: list[ResumePoint]

    # -- what the manager calls ------------------------------------------------

    def new_step_starts(self) -> None:
        """Note that what was added in the step before is written by now."""
        for point in self._being_written:
            self.tree.make_ready(point)
        self._being_written.clear()
        self.moved.clear()

    def places(self, request: Request, limit: int) -> Iterable[tuple[ResumePoint, int]]:
        """Yield where a request can go on, the latest first; see ``ResumeTree``."""
        key = self.keys.key(request, min(limit + 1, request.num_tokens))
        return self.tree.places(key, self.keys.namespace(request), limit)

    def add_point(
        self,
        request: Request,
        num_tokens: int,
        block_at: BlockAt,
        *,
        shared: bool = False,
        written: bool = True,
        ahead: bytes | None = b"",
    ) -> ResumePoint | None:
        """Add a resume point; return it, or None if it is there or cannot be.

        Args:
            request: that has computed it.
            num_tokens: after which it lies.
            block_at: the request's blocks.
            shared: whether several requests are known to go on from it.
            written: whether steps before this one have written all of it.
            ahead: see ``ResumePoint``.
        """
        added = self.tree.add(
            self.keys.key(request, num_tokens),
            self.keys.namespace(request),
            num_tokens,
            block_at,
            shared=shared,
            ready=written,
            ahead=ahead,
        )
        if added is None:
            return None
        point, new = added
        for block_id in new:
            block = self.blocks[block_id]
            if block.block_hash is None:
                # Of no tokens, so that vLLM may give it a hash once it is full.
                block.set_block_hash(self._marks[block_id], 0)
        if not written:
            self._being_written.append(point)
        return point

    def remove_point(self, point: ResumePoint) -> None:
        """Remove a point that will not be written."""
        self._drop(self.tree.remove(point))

    def note_answer(self, request: Request) -> None:
        """Note where the answer of a request that ended can be gone on from."""
        start = request.num_prompt_tokens
        end = min(request.num_computed_tokens, request.num_tokens)
        if start < end:
            key, namespace = self.keys.key(request, end), self.keys.namespace(request)
            self.tree.note_answer(key, namespace, start, end)

    def drop(self, block: KVCacheBlock) -> None:
        """Remove what needs a block that will not be written, if it is cached."""
        if block.block_id in self.tree:
            self._drop(self.tree.discard(block.block_id))

    def announce_hit(self, request: Request, num_tokens: int, whole: bool) -> None:
        """Announce the blocks of a hit once more, for who asked for full reports.

        Args:
            request: that was hit.
            num_tokens: so many of its tokens.
            whole: whether the hit ends with a block of each group; else only whole
                blocks of full attention have hashes.
        """
        for group, component in enumerate(self.tree.components):
            if whole or isinstance(component, Dense):
                size = component.block_size
                self.emit_cached_block_events(request, num_tokens // size, size, group)

    # -- what vLLM calls -------------------------------------------------------

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Note blocks in vLLM's map, if it is kept; the tree takes points instead.

        Args:
            request: whose blocks.
            blocks: all its blocks.
            num_cached_blocks: of them, how many were noted before.
            num_full_blocks: up to which they are noted now.
            block_size: tokens in a block of the group.
            kv_cache_group_id: the group.
            block_mask: which of them stock would keep, junctions apart; None for all.
        """
        if not self.mirror:
            return
        if block_mask is not None:
            component = self.tree.components[kv_cache_group_id]
            for place in self.junctions(request):
                first = max(component.first_block(place), num_cached_blocks)
                for index in range(first, min(place // block_size, num_full_blocks)):
                    block_mask[index - num_cached_blocks] = True
        super().cache_full_blocks(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            block_mask,
        )

    def cache_partial_block(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: points lie at any token."""

    def move_block_hashes(
        self, src_block: KVCacheBlock, dst_block: KVCacheBlock
    ) -> None:
        """Note that a step copies a block before it writes to it."""
        self.moved[src_block.block_id] = dst_block

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop blocks and all that needs them."""
        for block_id in block_ids:
            self._drop(self.tree.discard(block_id))
        super().evict_blocks(block_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, if none is in use."""
        if not super().reset_prefix_cache():
            return False
        self.tally.evicted_blocks["reset"] += self.tree.num_cached
        self.tree.reset()
        self._being_written.clear()
        if self.hint_notes is not None:
            self.hint_notes.reset()
        return True

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        if block.block_hash is None:
            if self.metrics_collector:
                self.metrics_collector.on_block_evicted(block)
            return False
        if block.block_id in self.tree:
            evicted = self.tree.discard(block.block_id)
            self.tally.note_evicted(evicted)
            self._reuse(evicted)
        return self._forget(block)

    def _emit_block_removed_events(
        self, block_hashes: list[BlockHashWithGroupId]
    ) -> None:
        """Say what is cached no more: not what another block still holds."""
        if self.enable_kv_cache_events:
            cached = self.cached_block_hash_to_block
            super()._emit_block_removed_events(
                [one for one in block_hashes if cached.get_one_block(one) is None]
            )

    # -- between tree and list -------------------------------------------------

    def _forget(self, block: KVCacheBlock) -> bool:
        """Take a block's mark, or its hashes out of vLLM's map, and say so."""
        if self.mirror:
            return super()._maybe_evict_cached_block(block)
        if self.metrics_collector:
            self.metrics_collector.on_block_evicted(block)
        block.reset_hash()
        return True

    def _release(self, blocks: list[KVCacheBlock]) -> None:
        """Tell the tree which of the blocks no request will use any more."""
        free = ids_to_be_free(self, blocks)
        self.tally.note_idle(free)
        self.tree.release(free)
        for block_id in free:
            # Before vLLM files it: without a hash it goes to the head.
            if block_id not in self.tree:
                block = self.blocks[block_id]
                if block.block_hash is not None:
                    self._forget(block)

    def _drop(self, block_ids: list[int]) -> None:
        """Take idle blocks that went blank though nothing needed the room."""
        self.tally.evicted_blocks["dropped"] += len(block_ids)
        self._reuse(block_ids)

    def _put_next(self, block_ids: list[int], blank: int) -> None:
        self._reuse(block_ids)

    def _reuse(self, block_ids: list[int]) -> None:
        """Take idle blocks that went blank, to be reused first."""
        for block_id in block_ids:
            if self.blocks[block_id].block_hash is not None:
                self._forget(self.blocks[block_id])
        # Not those that were taken off the list just now.
        put_first(self, (i for i in block_ids if self.blocks[i].prev_free_block))

    # -- proof -----------------------------------------------------------------

    def check(self) -> None:
        """Verify the tree, and that pool and tree agree: O(everything).

        Raises:
            AssertionError: an invariant is broken.
        """
        self.tree.check()
        self._check_free_list()
        for block in self.blocks:
            if block.is_null:
                continue
            block_id = block.block_id
            cached = block_id in self.tree
            assert self.tree.is_idle(block_id) == (cached and not block.ref_cnt), (
                f"{block!r}: tree and list disagree on whether it is idle"
            )
            if cached:
                assert block.block_hash is not None, f"{block!r} is cached, unmarked"
            elif not block.ref_cnt:
                assert block.block_hash is None, f"{block!r} is marked, not cached"
