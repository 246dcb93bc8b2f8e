"""The KV cache manager: vLLM's own, finding prefixes by tokens, not by hash."""

from typing import Any

from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.compat import (
    KVCacheBlock,
    KVCacheBlocks,
    KVCacheManager,
    Request,
    drops_last_block,
)
from vllm_radix.engine.follow_ups import BlockFollowUps
from vllm_radix.engine.groups.full_attention import RadixFullAttentionManager
from vllm_radix.engine.miss_log import MissLog
from vllm_radix.engine.reuse_notes import ReuseNotes
from vllm_radix.engine.tree_manager import TreeKVCacheManager
from vllm_radix.tree import LRU, EvictionPolicy, Match

_ROOM = 2
"""Blocks left free beyond what a request needs before one is spent on a copy."""


class RadixKVCacheManager(TreeKVCacheManager):
    """A ``KVCacheManager`` over a radix tree, for one full-attention group.

    Takes vLLM's arguments. ``adopt`` turns an existing manager into one: the
    scheduler's constructor builds it and binds connectors to that object.

    Attributes:
        min_sub_block_tokens: fewest tokens of a hit inside a block that are worth
            a copy of the block; None looks at block boundaries only.
        plans: None; nobody has to plan where such models can go on.
    """

    block_pool: RadixBlockPool
    plans: None = None
    min_sub_block_tokens: int | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt(LRU())

    @classmethod
    def adopt(
        cls, manager: KVCacheManager, policy: EvictionPolicy, **options: Any
    ) -> "RadixKVCacheManager":
        """Turn an unused manager, and its pool, into radix ones, in place.

        Args:
            manager: vLLM's.
            policy: says which idle blocks are evicted first.
            options: ``mirror``, ``min_sub_block_tokens``, ``explain`` and
                ``num_draft_tokens``, for which slots are allocated as well.
        """
        manager.__class__ = cls
        manager._adopt(policy, **options)
        return manager

    def _adopt(
        self,
        policy: EvictionPolicy,
        mirror: bool = False,
        min_sub_block_tokens: int | None = None,
        explain: bool = False,
        num_draft_tokens: int = 0,
    ) -> None:
        RadixBlockPool.adopt(self.block_pool, policy, mirror)
        (group,) = self.coordinator.single_type_managers
        self._group = RadixFullAttentionManager.adopt(group)
        if not self.enable_caching or 0 in self.coordinator.eagle_group_ids:
            min_sub_block_tokens = None
        self.min_sub_block_tokens = min_sub_block_tokens
        drafts = -(-num_draft_tokens // self.block_pool.hash_block_size)
        self._room = _ROOM + drafts
        self._drops_last_block = drops_last_block(self.coordinator, 0)
        # The block that the request looked up last is to copy from.
        self._hit: KVCacheBlock | None = None
        self.miss_log = MissLog(self.block_pool) if explain else None
        tree, keys = self.block_pool.tree, self.block_pool.keys
        self._reuse_notes = ReuseNotes(tree, keys) if tree.learns else None

    def note_arrival(self, num_tokens: int) -> None:
        """Do nothing: a block has room for a block."""

    @staticmethod
    def units(blocks: int) -> int:
        """Return blocks in what the tree counts prefixes in: blocks."""
        return blocks

    # -- looking up ------------------------------------------------------------

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        """Return the longest cached prefix of a request.

        The last block may be a partial hit, of which vLLM makes a copy.

        Args:
            request: the request.
            max_cache_hit_length: most tokens of it; None for all but the last one.

        Returns:
            As vLLM's: the blocks, the tokens they hold, and 0 (no sparse group
            lags behind).
        """
        self._group.taken = self._hit = None
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        pool = self.block_pool
        # At least one token is computed, for its logits.
        limit = request.num_tokens - 1
        if max_cache_hit_length is not None:
            limit = min(limit, max_cache_hit_length)
        inside = self._may_end_inside(request)
        match = pool.match(request, limit, partial=inside)
        if inside and pool.open_tails:
            least = self.min_sub_block_tokens or 1
            match = pool.match_open_tails(request, limit, least, match)
        blocks = [pool.blocks[block_id] for block_id in match.blocks]
        if blocks and self._drops_last_block:
            # EAGLE computes the last block again, for its hidden states.
            blocks.pop()
        elif pool.lookahead is not None:
            pool.lookahead.trim(request, blocks)
        num_tokens = len(blocks) * pool.hash_block_size
        if (
            blocks
            and self.enable_kv_cache_events
            and getattr(request, "kv_cache_report_mode", "incremental") == "full"
        ):
            self.coordinator.emit_cached_block_events(request, (blocks,))
        if match.partial is not None:
            last = self._partial_hit(request, match, blocks)
            if last is not None:
                blocks = [*blocks, last]
                num_tokens += match.partial.num_tokens
        if self.miss_log is not None:
            self.miss_log.record_lookup(request, num_tokens)
        return self.create_kv_cache_blocks((blocks,)), num_tokens, 0

    def _may_end_inside(self, request: Request) -> bool:
        return self.min_sub_block_tokens is not None and self.block_pool.keys.is_plain(
            request
        )

    def _partial_hit(
        self, request: Request, match: Match, blocks: list[KVCacheBlock]
    ) -> KVCacheBlock | None:
        """Return the block that a hit ends in, unless a copy of it is too dear."""
        assert match.partial is not None and self.min_sub_block_tokens is not None
        pool = self.block_pool
        source = pool.blocks[match.partial.block]
        if not source.ref_cnt and match.partial.num_tokens == match.partial.num_valid:
            self._group.taken = source
            return source
        if match.partial.num_tokens < self.min_sub_block_tokens:
            return None
        # Until the copy is made both blocks are in use. A request that fits
        # without must not wait for that.
        needed = -(-request.num_tokens // pool.hash_block_size) - len(blocks)
        needed += sum(not block.ref_cnt for block in blocks) + self._room
        if needed + self.watermark_blocks >= pool.get_num_free_blocks():
            return None
        self._hit = source
        return source

    def record_prefix_cache_stats(
        self, request: Request, num_hits: int, *args: Any, **kwargs: Any
    ) -> None:
        """Record a look-up; its request is admitted now, and computes from there."""
        super().record_prefix_cache_stats(request, num_hits, *args, **kwargs)
        pool = self.block_pool
        if not request.num_preemptions and self.prefix_cache_lookup_enabled(request):
            size = pool.hash_block_size
            pool.tally.note_lookup(request.num_tokens, num_hits, size)
        if self._hit is not None:
            pool.tree.note_hit(self._hit.block_id)
            self._hit = None
        if self.miss_log is not None:
            self.miss_log.record_admission(request)
        if self._reuse_notes is not None:
            blocks = self.held_blocks(request.request_id)
            self._reuse_notes.admit(request, blocks, num_hits)
        if pool.hint_notes is not None:
            held = self.held_blocks(request.request_id)
            pool.hint_notes.admit(request, held, num_hits)
        if self._may_end_inside(request):
            request_id = request.request_id
            pool.open_tails.follow(
                request,
                self._group.req_to_blocks[request_id],
                self._group.num_cached_block.get(request_id, 0),
            )

    def make_follow_ups(self) -> BlockFollowUps:
        """Return what recognizes requests that go on from an answer, by its blocks."""
        return BlockFollowUps(self.block_pool.keys, self.held_blocks)

    def held_blocks(self, request_id: str) -> list[KVCacheBlock]:
        """Return the blocks that a request holds, by position: vLLM's own list."""
        blocks: list[KVCacheBlock] = self._group.req_to_blocks.get(request_id, [])
        return blocks

    # -- leaving ---------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        """Publish what a leaving request has computed, its last block as well."""
        super()._leave(request)
        self.block_pool.open_tails.leave(request)
        blocks = self._group.req_to_blocks.get(request.request_id)
        if blocks and self.enable_caching:
            self.block_pool.retract(blocks, request.num_computed_tokens)
            if not request.resumable:
                # With asynchronous scheduling the last token may be computed, and fill
                # its block, though no slots are allocated for the request any more.
                known = min(request.num_computed_tokens, request.num_tokens)
                self.cache_blocks(request, known)
            if self._may_end_inside(request):
                self.block_pool.cache_partial(request, blocks)
            if self._reuse_notes is not None:
                self._reuse_notes.leave(request, blocks)
            if self.block_pool.hint_notes is not None:
                self.block_pool.hint_notes.leave(request, blocks)
