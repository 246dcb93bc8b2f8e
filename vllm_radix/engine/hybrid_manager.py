"""The KV cache manager of models with several kinds of layers.

vLLM's own, with its look-up replaced by a tree of resume points. vLLM allocates,
slides windows, moves states and copies blocks as always; this class says where a
request goes on, and which of its blocks stay for others::

    look-up      the deepest point of the tree on the request's path
    admission    a plan: where others will part from this request
    each step    points at what the plan names and the step has reached
    end          a point where the request stops
"""

from dataclasses import replace
from math import lcm
from typing import Any

from vllm_radix.engine.compat import (
    KVCacheBlock,
    KVCacheBlocks,
    KVCacheManager,
    Request,
)
from vllm_radix.engine.follow_ups import PointFollowUps
from vllm_radix.engine.groups import GROUP_TYPES
from vllm_radix.engine.groups.mamba import unit_of
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.engine.miss_log import PointMissLog
from vllm_radix.engine.resume_places import ResumePlaces
from vllm_radix.engine.resume_plans import ResumePlan, ResumePlans
from vllm_radix.engine.state_points import StatePoints
from vllm_radix.engine.tree_manager import TreeKVCacheManager
from vllm_radix.engine.typical_request import TypicalRequest
from vllm_radix.tree import BYTES_PER_TOKEN, HOLE
from vllm_radix.tree.resume import Chunk, Dense, ResumePoint, State, Window

MIN_TOKENS_PER_STATE = 32
"""Fewest tokens that a state must save: it costs a step that ends there, and blocks."""


class HybridKVCacheManager(TreeKVCacheManager):
    """A ``KVCacheManager`` over a tree of resume points, for any cache groups.

    ``adopt`` turns an existing manager into one.

    Attributes:
        plans: where running requests leave resume points.
        align: resume points lie at multiples of so many tokens.
    """

    block_pool: HybridBlockPool
    plans: ResumePlans
    align: int
    _states: StatePoints | None

    @classmethod
    def adopt(
        cls,
        manager: KVCacheManager,
        mirror: bool = False,
        min_sub_block_tokens: int | None = None,
        explain: bool = False,
        num_draft_tokens: int = 0,
        lookahead: int = 0,
    ) -> "HybridKVCacheManager":
        """Turn an unused manager, and its pool, into hybrid ones, in place.

        Args:
            manager: vLLM's.
            mirror: keep vLLM's map of hashes as well.
            min_sub_block_tokens: fewest tokens of a hit inside a block that are worth
                copies of blocks; None for hits that end with blocks only.
            explain: keep a ``miss_log``.
            num_draft_tokens: for which slots are allocated as well.
            lookahead: tokens behind its own that a slot of a draft model depends on.
        """
        manager.__class__ = cls
        manager._adopt(
            mirror, min_sub_block_tokens, explain, num_draft_tokens, lookahead
        )
        return manager

    def _adopt(
        self,
        mirror: bool,
        min_sub_block_tokens: int | None,
        explain: bool,
        num_draft_tokens: int = 0,
        lookahead: int = 0,
    ) -> None:
        self._groups = self.coordinator.single_type_managers
        self._components = [
            GROUP_TYPES[type(group)].component(group) for group in self._groups
        ]
        dense = not any(isinstance(c, State) for c in self._components)
        if lookahead and dense:
            self._components = [
                replace(c, behind=lookahead) if isinstance(c, Window) else c
                for c in self._components
            ]
        HybridBlockPool.adopt(self.block_pool, self._components, mirror)
        whole = self.coordinator.scheduler_block_size
        self._chunks = sorted(
            {c.chunk for c in self._components if isinstance(c, Chunk)}
        )
        self.align = max(component.grain for component in self._components)
        unit = unit_of(self.coordinator)
        if min_sub_block_tokens is None:
            self.align = lcm(self.align, unit) if unit else whole
        gap = min_sub_block_tokens or 1
        if not dense:
            gap = max(gap, MIN_TOKENS_PER_STATE)
        self._typical = TypicalRequest(self._components)
        tokens = 2 * self.units(self.block_pool.num_gpu_blocks)
        self._lookahead = lookahead
        self.plans = ResumePlans(
            self.align, gap, tokens, dense=dense, lookahead=0 if dense else lookahead
        )
        self.miss_log = PointMissLog(self.block_pool, self.plans) if explain else None
        self._whole = whole
        self.block_pool.junctions = self._whole_junctions
        self._places = ResumePlaces(
            self.block_pool,
            self._groups,
            self.align,
            whole,
            self.watermark_blocks,
            min_sub_block_tokens,
            num_draft_tokens,
            lookahead,
        )
        self._interval = self.coordinator.retention_interval
        self._states = None
        if not dense:
            self._states = StatePoints(
                self.block_pool,
                self._groups,
                whole,
                unit,
                self._interval,
                num_draft_tokens > 0,
                self._add,
            )
        # What the request looked up last is to go on from, and its plan.
        self._looked_up: tuple[str, int | None, ResumePlan] | None = None

    def note_arrival(self, num_tokens: int) -> None:
        """Note the length of a request that came, for ``units``."""
        self._typical.note_arrival(num_tokens)

    def units(self, blocks: int) -> int:
        """Return how many tokens blocks have room for, in requests as they come."""
        return self._typical.tokens_in(blocks)

    def new_step_starts(self) -> None:
        """Note that what the step before wrote can be read."""
        for plan in self.plans.open():
            plan.open.difference_update(
                point.num_tokens for point in plan.unwritten if point.alive
            )
        super().new_step_starts()

    # -- looking up ------------------------------------------------------------

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        """Return the blocks with which a request can go on as late as possible.

        Args:
            request: the request.
            max_cache_hit_length: most tokens that need not be computed; None for all
                but the last one.

        Returns:
            As vLLM's: the blocks of each group, the tokens that need not be
            computed, and 0 (junctions are planned here).
        """
        self._looked_up = None
        if not self.enable_caching:
            return self.empty_kv_cache_blocks, 0, 0
        limit, found = request.num_tokens - 1, None
        if self.prefix_cache_lookup_enabled(request):
            most = limit if max_cache_hit_length is None else max_cache_hit_length
            found = self._places.latest(request, min(limit, most))
            if self.miss_log is not None:
                self.miss_log.record_lookup(request, found.num_tokens if found else 0)
        cached = 0 if found is None else found.num_tokens
        plan = self._plan(request, limit, cached)
        self._looked_up = request.request_id, found.point if found else None, plan
        if found is None:
            return self.empty_kv_cache_blocks, 0, 0
        pool = self.block_pool
        blocks: list[list[KVCacheBlock]] = []
        for run in found.runs:
            kept = [pool.blocks[block_id] for block_id in run.blocks]
            blocks.append([pool.null_block] * run.first + kept)
        if (
            self.enable_kv_cache_events
            and getattr(request, "kv_cache_report_mode", "incremental") == "full"
        ):
            self.block_pool.announce_hit(request, cached, cached % self._whole == 0)
        return self.create_kv_cache_blocks(tuple(blocks)), cached, 0

    def _plan(self, request: Request, limit: int, cached: int) -> ResumePlan:
        """Return where a request that goes on at ``cached`` leaves resume points."""
        plan = ResumePlan(request)
        if request.resumable:
            return plan
        pool = self.block_pool
        key = pool.keys.key(request, limit)[: limit * pool.tree.block_bytes]
        plan.key, plan.namespace = bytes(key), pool.keys.namespace(request)
        public = pool.keys.num_public(request)
        places = self.plans.junctions(plan, limit, cached, public)
        if pool.keys.is_plain(request):
            plan.junctions = places
            if self._states is not None:
                ends = self._states.with_ends
                plan.junctions = ends(self.plans, plan, places, cached)
        else:
            whole = (n // self._whole * self._whole for n in places)
            plan.junctions = places = sorted({n for n in whole if n > cached})
        plan.open = set(places)
        if self._states is not None:
            plan.published = request.num_tokens
        boundary = (request.num_prompt_tokens - 1) // self._whole * self._whole
        if self._states is None:
            # With drafts, where others go on without a copy, as with stock.
            places = [boundary - self._whole] if self._lookahead else []
            plan.boundaries = [n for n in (*places, boundary) if n > cached]
        return plan

    def record_prefix_cache_stats(
        self, request: Request, num_hits: int, *args: Any, **kwargs: Any
    ) -> None:
        """Record a look-up; its request is admitted now, and computes from there."""
        super().record_prefix_cache_stats(request, num_hits, *args, **kwargs)
        if not request.num_preemptions and self.prefix_cache_lookup_enabled(request):
            tally = self.block_pool.tally
            tally.note_lookup(request.num_tokens, num_hits, self._whole)
        if self._looked_up is not None and self._looked_up[1] is not None:
            self.block_pool.tree.note_hit(self._looked_up[1])
        if self.miss_log is not None:
            self.miss_log.record_admission(request)
        if self.block_pool.hint_notes is not None:
            tables = [g.req_to_blocks.get(request.request_id, ()) for g in self._groups]
            self.block_pool.hint_notes.admit(request, tables, num_hits)

    # -- computing -------------------------------------------------------------

    def next_stop(self, request: Request, start: int, end: int) -> int:
        """Return where a step is to end that would compute from start to end.

        States can be kept only where a step ends.
        """
        plan = self._plan_of(request)
        if plan is not None and self._states is not None:
            for place in plan.junctions:
                # Stock's own step ends at the tail, unless kernels hand it out.
                if start < place < end and place != plan.tail:
                    return place
        return end

    def _plan_of(self, request: Request) -> ResumePlan | None:
        """Return the plan of a request that runs, or was looked up just now."""
        plan = self.plans.get(request.request_id)
        if plan is None and self._looked_up is not None:
            request_id, _, looked_up = self._looked_up
            if request_id == request.request_id:
                return looked_up
        return plan

    def _whole_junctions(self, request: Request) -> list[int]:
        """Return where a request is to leave points for others at ends of blocks."""
        plan = self._plan_of(request)
        junctions = [] if plan is None else plan.junctions
        return [place for place in junctions if place % self._whole == 0]

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """Add slots for a step, and resume points at what it reaches."""
        plan = self._plan_of(request)
        if plan is not None and self._states is not None:
            self._states.publish_decoded(plan)
        blocks = super().allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        if blocks is None and plan is not None and plan.copied_at:
            # Nobody is preempted for the sake of a copy.
            assert self._states is not None
            self._states.copy_nothing(plan)
            blocks = super().allocate_slots(
                request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
            )
        publishes = self.enable_caching and not request.resumable
        if blocks is None or plan is None or not publishes:
            return blocks
        if self.plans.get(request.request_id) is None:
            self.plans.start(plan)
        done = request.num_computed_tokens + num_new_computed_tokens
        self._publish(plan, done, done + num_new_tokens)
        return blocks

    def _publish(self, plan: ResumePlan, start: int, stop: int) -> None:
        """Add the points that a step from start to stop makes possible."""
        request = plan.request
        done = request.num_computed_tokens
        plan.unwritten = [p for p in plan.unwritten if p.num_tokens > done]
        known = min(stop, request.num_tokens)
        if self._states is not None:
            if plan.copied_at:
                self._states.publish_copy(plan)
            self._states.publish(plan, stop, known)
            return
        first = start if plan.published is None else plan.published
        plan.published = max(known, first)
        for chunk in self._chunks:
            # Chunks stay whole, as stock keeps them: a point at the last place in each.
            for end in range((first // chunk + 1) * chunk, known + 1, chunk):
                self._add(plan, (end - 1) // self.align * self.align)
        while plan.junctions and plan.junctions[0] <= known:
            self._add(plan, plan.junctions.pop(0), shared=True)
        while plan.boundaries and plan.boundaries[0] <= known:
            self._add(plan, plan.boundaries.pop(0))
        if self._interval != 0:
            step = self._interval or self._whole
            for place in range((first // step + 1) * step, known + 1, step):
                self._add(plan, place)

    def _add(
        self,
        plan: ResumePlan,
        place: int,
        shared: bool = False,
        copies: dict[int, int] | None = None,
    ) -> ResumePoint | None:
        """Add a resume point of a running request."""
        request = plan.request
        if place % self.align:
            return None
        written = place <= request.num_computed_tokens and not copies
        ahead = self._ahead_of(request, place)
        point = self.block_pool.add_point(
            request,
            place,
            self._block_at(request, copies),
            shared=shared,
            written=written,
            ahead=ahead,
        )
        if point is None or written:
            plan.open.discard(place)
        if point is not None and not written:
            plan.unwritten.append(point)
        if point is not None and ahead is None:
            plan.unfollowed.append(point)
        return point

    def _ahead_of(self, request: Request, place: int) -> bytes | None:
        """Return the tokens that a draft model's last slot before a place depends on.

        None if they are not known. At the ends of blocks none, as with windows.
        """
        if self._states is None or not self._lookahead or place % self._whole == 0:
            return b""
        end = place + self._lookahead
        if end > request.num_tokens:
            return None
        key = self.block_pool.keys.key(request, end)
        return bytes(key[place * BYTES_PER_TOKEN : end * BYTES_PER_TOKEN])

    def _block_at(self, request: Request, copies: dict[int, int] | None = None) -> Any:
        """Return what tells a request's blocks, by group and index."""
        tables = [
            group.req_to_blocks.get(request.request_id) or () for group in self._groups
        ]

        def block_at(group: int, index: int) -> int:
            if copies and group in copies:
                return copies[group]
            table = tables[group]
            if index >= len(table) or table[index].is_null:
                return HOLE
            block_id: int = table[index].block_id
            return block_id

        return block_at

    # -- leaving ---------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        """Add a point where a leaving request stops; note where an answer ends."""
        super()._leave(request)
        plan = self.plans.pop(request.request_id)
        if plan is not None:
            self._leave_points(plan)
            if request.is_finished():
                self.block_pool.note_answer(request)
        if self.block_pool.hint_notes is not None:
            self.block_pool.hint_notes.leave(request)

    def _leave_points(self, plan: ResumePlan) -> None:
        """Add a point where an ending or preempted request stops, and no further."""
        request = plan.request
        done = request.num_computed_tokens
        self._retract(plan, done)
        for point in plan.unfollowed:
            ahead = self._ahead_of(request, point.num_tokens)
            if ahead is None:
                self.block_pool.remove_point(point)
            else:
                self.block_pool.tree.note_ahead(point, ahead)
        if self._states is not None and not self._states.is_in_place(plan, done):
            return
        place = min(done, request.num_tokens)
        if self._states is None:
            place -= place % self.align
        block_at = self._block_at(request)
        whole = place // self._whole * self._whole
        if self._states is None and 0 < whole < place:
            # What is left when the last blocks, partly filled, are to go.
            self.block_pool.add_point(request, whole, block_at)
        ahead = self._ahead_of(request, place)
        if place and place % self.align == 0 and ahead is not None:
            self.block_pool.add_point(request, place, block_at, ahead=ahead)

    def _retract(self, plan: ResumePlan, done: int) -> None:
        """Take back what a request published in this step and will not compute.

        Args:
            plan: of the request.
            done: tokens that it has computed in earlier steps.
        """
        unwritten = [point for point in plan.unwritten if point.num_tokens > done]
        for point in unwritten:
            self.block_pool.remove_point(point)
        if not unwritten:
            return
        # Another request may have put a point behind them on the same path.
        for component, group in zip(self._components, self._groups, strict=True):
            blocks = group.req_to_blocks.get(plan.request.request_id) or ()
            for block in blocks[done // component.block_size :]:
                if isinstance(component, Dense) and not block.is_null:
                    self.block_pool.drop(block)

    def make_follow_ups(self) -> PointFollowUps:
        """Return what recognizes requests that go on from an answer, by its point."""
        return PointFollowUps(self.block_pool.tree)

    def reset_prefix_cache(self) -> bool:
        """Forget all that is cached, and the prompts that came before."""
        if not super().reset_prefix_cache():
            return False
        self.plans.forget_prompts()
        return True
