"""The block pool: vLLM's own, with the radix tree as its prefix cache.

The tree decides which blocks are found and which go first; this class executes
it on vLLM's blocks. Reference counts, the free list, metrics and events stay
vLLM's, and so do the hashes that KV events and connectors read, where there are any.

The free list stays a true linked list with an exact length, in two parts::

    head [ blank blocks | cached, idle blocks ] tail
           reused first   reused when the tree says so

Blocks let go with ``unpin_blocks`` (HiSparse) are the exception vLLM makes: blank
ones among them stay at the tail, to be reused last.
"""

from collections.abc import Sequence
from typing import Any, overload

from vllm_radix.engine.compat import (
    BlockPool,
    KVCacheBlock,
    Request,
    num_hash_lookahead_tokens,
)
from vllm_radix.engine.free_list import ids_to_be_free, make_marks, put_first
from vllm_radix.engine.hint_notes import BlockHintNotes
from vllm_radix.engine.lookahead import BlockLookahead
from vllm_radix.engine.open_tails import OpenBlocks
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.tree_pool import TreeBlockPool
from vllm_radix.metrics.tally import Tally
from vllm_radix.tree import (
    BYTES_PER_TOKEN,
    LRU,
    EvictionPolicy,
    Match,
    PartialMatch,
    RadixTree,
    common_units,
)


class _Ids(Sequence[int]):
    """The ids of a request's first blocks, of which only the last are new.

    A request that fills one more block would else pay for its whole length.

    Args:
        blocks: the request's blocks.
        start: how many of them the tree knows.
        count: how many there are.

    Attributes:
        new: the ids from ``start`` on.
    """

    def __init__(self, blocks: Sequence[KVCacheBlock], start: int, count: int) -> None:
        self._blocks = blocks
        self._start = start
        self.new = [block.block_id for block in blocks[start:count]]

    def __len__(self) -> int:
        return self._start + len(self.new)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, int):
            if index < 0:
                index += len(self)
            return self._blocks[index].block_id
        if index == slice(self._start, None):
            return self.new
        return [self._blocks[i].block_id for i in range(*index.indices(len(self)))]


class RadixBlockPool(TreeBlockPool):
    """A ``BlockPool`` whose prefix cache is a radix tree.

    Takes vLLM's arguments. ``adopt`` turns an existing pool into one instead:
    vLLM builds its pool deep inside, and everything binds to that object.

    Attributes:
        tree: the prefix cache.
        keys: the keys of requests in it.
        open_tails: running requests that may be found in their last block.
        tally: counts of what happens, for metrics.
        mirror: whether vLLM's map of hashes is kept beside the tree, for KV
            events and others who read it. Without, a cached block carries a mark
            in place of its hash, for that tells vLLM that it is cached.
        mirror_by_default: keep it whether or not anybody reads it; for tests.
        hint_notes: follows the hints of clients, if the scheduler wants that.
        lookahead: what came after each block, if a hit depends on it.
    """

    tree: RadixTree
    mirror_by_default = False
    hint_notes: BlockHintNotes | None = None
    lookahead: BlockLookahead | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plant(LRU(), mirror=False)

    @classmethod
    def adopt(
        cls, pool: BlockPool, policy: EvictionPolicy, mirror: bool = False
    ) -> "RadixBlockPool":
        """Turn an unused pool into a radix pool, in place.

        Raises:
            RuntimeError: blocks are in use or cached already.
        """
        cls.check_unused(pool)
        pool.__class__ = cls
        pool._plant(policy, mirror)
        return pool

    def _plant(self, policy: EvictionPolicy, mirror: bool) -> None:
        self.tree = RadixTree(self.hash_block_size, policy)
        self.keys = RequestKeys(self.hash_block_size, self.num_gpu_blocks)
        self.mirror = (
            mirror or self.mirror_by_default or bool(self.enable_kv_cache_events)
        )
        ahead = num_hash_lookahead_tokens(self)
        self.lookahead = BlockLookahead(self.keys, ahead) if ahead else None
        self._marks = make_marks(self.num_gpu_blocks)
        self.open_tails = OpenBlocks()
        self.tally = Tally(self.num_gpu_blocks)
        # Why a block that vLLM drops goes.
        self._why_dropped = "room"
        # Blocks that this step fills, and how many tokens earlier steps wrote into
        # them: more cannot be copied, for a step copies before it writes.
        self._written: dict[int, int] = {}

    # -- reading ---------------------------------------------------------------

    def match(self, request: Request, limit: int, partial: bool = False) -> Match:
        """Return the longest cached prefix of a request, of up to ``limit`` tokens.

        Args:
            request: the request.
            limit: most tokens to match.
            partial: look for a hit that ends inside a block that was written in
                an earlier step, too.
        """
        return self.tree.match(
            self.keys.key(request, limit),
            self.keys.namespace(request),
            limit,
            partial=partial,
            written=self._written,
        )

    # -- what the manager calls ------------------------------------------------

    def new_step_starts(self) -> None:
        """Note that what was cached so far is written before blocks are copied."""
        self._written.clear()
        self.open_tails.new_step_starts()

    def match_open_tails(
        self, request: Request, limit: int, least: int, match: Match
    ) -> Match:
        """Return a match that may end in the open block of a running request.

        Args:
            request: the plain request that is looked up.
            limit: most tokens to match.
            least: fewest tokens inside a block that are of use.
            match: what of it is cached.
        """
        size, depth = self.hash_block_size, match.num_blocks
        wanted = min(size - 1, limit - depth * size)
        best = max(least - 1, match.partial.num_tokens if match.partial else 0)
        before = match.blocks[-1] if depth else None
        if wanted <= best or not self.open_tails.any_after(before):
            return match
        namespace = self.keys.namespace(request)
        rest = self.keys.part(request, depth * size, depth * size + wanted)
        found = None
        for other, blocks in self.open_tails.after(before):
            if len(blocks) <= depth:
                continue
            end = min(other.num_computed_tokens, other.num_tokens)
            tail = self.keys.part(other, depth * size, end)
            shared = common_units(rest, 0, tail, 0, BYTES_PER_TOKEN)
            if shared > best and self.keys.namespace(other) == namespace:
                best, found = shared, (other, blocks)
        if found is None:
            return match
        # It is copied from as it is. It enters the tree when its request ends.
        block = found[1][depth].block_id
        return Match(match.blocks, PartialMatch(block, best, best))

    def cache_partial(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Publish a request's last block, as far as earlier steps have filled it.

        Args:
            request: a plain request; its full blocks are published.
            blocks: all its blocks.
        """
        # Tokens in flight that nobody knows yet are not among num_tokens.
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        size = self.hash_block_size
        depth, part = divmod(num_tokens, size)
        if not part or depth >= len(blocks):
            return
        block = blocks[depth]
        if self.tree.partial_tokens(block.block_id) == part:
            return
        cached, freed = self.tree.insert_partial(
            self.keys.key(request, num_tokens)[: num_tokens * BYTES_PER_TOKEN],
            _Ids(blocks, depth, depth + 1),
            self.keys.namespace(request),
        )
        self._reuse(freed)
        block.reset_hash()
        if cached:
            block.set_block_hash(self._marks[block.block_id], num_tokens)

    def retract(self, blocks: Sequence[KVCacheBlock], num_computed_tokens: int) -> None:
        """Take back what a request published in this step and will not compute.

        Args:
            blocks: all its blocks.
            num_computed_tokens: what it has computed in earlier steps.
        """
        if self._written:
            self._why_dropped = "dropped"
            for block in blocks[num_computed_tokens // self.hash_block_size :]:
                if block.block_id in self._written:
                    self._maybe_evict_cached_block(block)
            self._why_dropped = "room"

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
        """Publish a request's blocks: to the tree, and to vLLM's map if kept."""
        if num_cached_blocks >= num_full_blocks:
            return
        if self.mirror:
            super().cache_full_blocks(
                request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs
            )
        size = self.hash_block_size
        ids = _Ids(blocks, num_cached_blocks, num_full_blocks)
        first = ids.new[0]
        # What earlier steps wrote into the first of them, theirs or an owner's
        # from whom it was taken over. (Who is admitted now has computed nothing.)
        part = max(
            self.tree.partial_tokens(first),
            request.num_computed_tokens - num_cached_blocks * size,
        )
        if self.lookahead is not None:
            kept = self.match(request, num_full_blocks * size).blocks
            self.lookahead.note(
                request, ids.new, num_cached_blocks, kept[num_cached_blocks:]
            )
        freed = self.tree.insert(
            self.keys.key(request, num_full_blocks * size),
            ids,
            self.keys.namespace(request),
            start=num_cached_blocks,
        )
        self._written.update(dict.fromkeys(ids.new, 0))
        if part > 0:
            self._written[first] = part
        if not self.mirror:
            if blocks[num_cached_blocks].block_hash is not None:
                blocks[num_cached_blocks].reset_hash()  # it was a partial block
            marks, end = self._marks, num_cached_blocks * size
            for block_id in ids.new:
                end += size
                self.blocks[block_id].set_block_hash(marks[block_id], end)
        self._reuse(freed)
        self.open_tails.move(request, blocks[num_full_blocks - 1])

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop blocks, duplicates of them and all that is cached below them.

        Called for blocks whose KV failed to load. What was computed from them
        is as wrong as they are, and would be found again once somebody has
        computed the prefix anew.
        """
        doomed = set(block_ids)
        for block_id in block_ids:
            doomed.update(self.tree.below(block_id))
        self._why_dropped = "dropped"
        super().evict_blocks(doomed)
        self._why_dropped = "room"
        put_first(
            self,
            [
                block_id
                for block_id in doomed
                if not self.blocks[block_id].ref_cnt
                and not self.blocks[block_id].is_null
            ],
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks, if none is in use."""
        if not super().reset_prefix_cache():
            return False
        self.tally.evicted_blocks["reset"] += self.tree.num_cached
        self.tree.reset()
        if self.hint_notes is not None:
            self.hint_notes.reset()
        self._written.clear()
        return True

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        if self.mirror:
            evicted = super()._maybe_evict_cached_block(block)
            self._discard(block)
            return evicted
        if self.metrics_collector:
            self.metrics_collector.on_block_evicted(block)
        if block.block_hash is None:
            return False
        block.reset_hash()
        self._discard(block)
        return True

    def _discard(self, block: KVCacheBlock) -> None:
        """Let the tree let go of a block, if it knows it, and count it."""
        if not self.tree.discard(block.block_id):
            return
        if self._why_dropped == "room":
            self.tally.note_evicted([block.block_id])
        else:
            self.tally.evicted_blocks[self._why_dropped] += 1

    # -- between tree and list -------------------------------------------------

    def _release(self, blocks: list[KVCacheBlock]) -> None:
        """Tell the tree which of the blocks nobody will use any more."""
        # Before vLLM files them: without a hash they go to the head.
        free = ids_to_be_free(self, blocks)
        self.tally.note_idle(free)
        freed = self.tree.release(free)
        if freed:
            self._retire(freed)
        if self.hint_notes is not None:
            self.hint_notes.released(blocks)

    def _retire(self, block_ids: list[int]) -> None:
        """Take blocks that went blank out of vLLM's map of hashes.

        Their content is still cached, so a subscriber is told of a removal only
        for hashes that no other block holds.
        """
        self.tally.evicted_blocks["duplicate"] += len(block_ids)
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

    def _reuse(self, block_ids: list[int]) -> None:
        """Take idle blocks that went blank, to be reused first."""
        if block_ids:
            self._retire(block_ids)
            put_first(self, block_ids)

    def _put_next(self, block_ids: list[int], blank: int) -> None:
        """Move free blocks to where they are reused after ``blank`` others.

        They mostly are there, for the list is in order of release as well.
        """
        if not self.mirror and not self.metrics_collector:
            for block_id in block_ids:
                self.blocks[block_id].reset_hash()  # nothing is left to evict
        block = self.free_block_queue.fake_free_list_head.next_free_block
        for _ in range(blank):
            assert block is not None
            block = block.next_free_block
        for index, block_id in enumerate(block_ids):
            if block is None or block.block_id != block_id:
                # The order among those that are reused now is of no account.
                put_first(self, block_ids[index:])
                return
            block = block.next_free_block

    # -- proof -----------------------------------------------------------------

    def check(self) -> None:
        """Verify the tree, and that pool and tree agree: O(everything).

        Conservation: each block but the null block is free or in use, and the
        tree calls a block idle if and only if it is cached and free.

        Raises:
            AssertionError: an invariant is broken.
        """
        self.tree.check()
        self._check_free_list()
        idle = 0
        for block in self.blocks:
            if block.is_null:
                continue
            block_id = block.block_id
            if self.tree.is_idle(block_id):
                assert block.ref_cnt == 0, f"{block!r} is in use, not idle"
                idle += 1
            elif block_id in self.tree:
                assert block.ref_cnt > 0, f"{block!r} is free, not held"
            assert (block.block_hash is None) == (block_id not in self.tree), (
                f"{block!r}: tree and hashes disagree"
            )
        assert idle == self.tree.stats().idle_blocks
