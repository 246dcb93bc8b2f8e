"""Resume points of models with states: where steps end, and by copies inside blocks.

A state is overwritten as tokens come. That at the end of a block stays behind in it;
one inside a block is kept by a copy, which vLLM makes at the start of the next step.

Guesses of drafts are computed in the same step as the token before them, and the state
after each of those lies in a block of its own. Where the scheduler cannot tell which of
them is the request's, there is no point: they are left while the prompt is computed,
and at its end, by a copy as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_radix.engine.groups.mamba import keep_state, last_unit
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.engine.resume_plans import ResumePlan, ResumePlans
from vllm_radix.tree.resume import ResumePoint, State

Add = Callable[..., ResumePoint | None]
"""Adds a point of a request: its plan, the place, ``shared``, and copies by group."""


class StatePoints:
    """Leaves resume points at states of running requests.

    Args:
        pool: with the tree.
        groups: vLLM's managers of the cache groups.
        whole: blocks of all groups end at multiples of so many tokens.
        unit: tokens between places where stock finds states inside blocks; 0 for none.
        interval: tokens between points to be kept; 0 for none, None for each block.
        drafts: whether tokens are guessed.
        add: adds a point.
    """

    def __init__(
        self,
        pool: HybridBlockPool,
        groups: Sequence[Any],
        whole: int,
        unit: int,
        interval: int | None,
        drafts: bool,
        add: Add,
    ) -> None:
        self._pool = pool
        self._whole, self._unit = whole, unit
        self._interval, self._drafts = interval, drafts
        self._add = add
        self._components = pool.tree.components
        self._managers = {
            group: groups[group]
            for group, component in enumerate(self._components)
            if isinstance(component, State)
        }

    def with_ends(
        self, plans: ResumePlans, plan: ResumePlan, places: list[int], cached: int
    ) -> list[int]:
        """Return junctions, and where steps are to end for the sake of a prompt's end.

        Args:
            plans: of all requests.
            plan: of the request.
            places: its junctions.
            cached: tokens that it finds cached itself.
        """
        request, tail, end = plan.request, 0, 0
        manager = next(iter(self._managers.values()))
        if self._unit:
            tail = last_unit(manager, request.num_prompt_tokens, self._unit)
        if self._drafts:
            end = request.num_tokens
        whole = last_unit(manager, request.num_tokens, self._whole)
        return plans.with_ends(plan, places, tail, end, max(cached, whole))

    def publish(self, plan: ResumePlan, end: int, known: int) -> None:
        """Add points where a step, or the one before, leaves a state.

        Args:
            plan: of the request.
            end: of the step, with its guesses.
            known: the tokens up to there that are known.
        """
        while plan.junctions and plan.junctions[0] <= end:
            place = plan.junctions.pop(0)
            if place != end or place > known:
                plan.open.discard(place)  # it went past
            elif all(place % m.block_size == 0 for m in self._managers.values()):
                self._add(plan, place, plan.is_junction(place))
            elif place != plan.end or self._has_room(plan):
                self._keep(plan, place)
        request_id = plan.request.request_id
        for group, manager in self._managers.items():
            # Kernels of a GPU can hand out a state from inside a step.
            place, index = manager._checkpoints.get(request_id, (0, 0))
            if place and index == self._components[group].first_block(place):
                self._add(plan, place)
        if self._drafts:
            # Where no guess lies before the end of a block.
            plan.stopped = end if end == known else 0
            if plan.stopped and not end % self._whole:
                self._add(plan, end)
            return
        if not end % self._whole:
            plan.state_at = end
        if plan.state_at and plan.state_at <= known:
            self._add(plan, plan.state_at)
            plan.state_at = 0

    def publish_decoded(self, plan: ResumePlan) -> None:
        """Add points at ends of blocks that an answer beside drafts has filled.

        To be called before vLLM lets go of them: as such a block becomes full, the
        worker puts the state there, whatever was guessed.
        """
        if not self._drafts or self._interval == 0 or plan.published is None:
            return
        request, step = plan.request, self._interval or self._whole
        first = plan.published
        done = min(request.num_computed_tokens, request.num_tokens)
        for place in range((first // step + 1) * step, done + 1, step):
            self._add(plan, place)
        plan.published = max(first, done)

    def is_in_place(self, plan: ResumePlan, done: int) -> bool:
        """Return whether the state after ``done`` tokens is in the block of the last.

        A state has seen every token up to there, those of a step under way included:
        where they are not known yet, nobody can ask for it.
        """
        return done <= plan.request.num_tokens and (
            not self._drafts or done == plan.stopped
        )

    def _has_room(self, plan: ResumePlan) -> bool:
        """Return whether a point where a prompt ends is worth what goes for it."""
        blocks = sum(plan.end % c.block_size > 0 for c in self._components)
        return self._pool.num_blank_blocks > blocks or self._pool.tree.is_worth_room(
            plan.end_saves, blocks
        )

    def _keep(self, plan: ResumePlan, place: int) -> None:
        """Have the next step copy the states that this one ends with."""
        for group, manager in self._managers.items():
            if place % manager.block_size == 0:
                continue
            block = keep_state(manager, plan.request.request_id, place)
            if block is None:
                plan.open.discard(place)
                return
            plan.copied[group] = block
        plan.copied_at = place

    def copy_nothing(self, plan: ResumePlan) -> None:
        """Take back that the next step is to copy states."""
        for group in plan.copied:
            self._managers[group]._partial_hit_reqs.pop(plan.request.request_id, None)
        plan.open.discard(plan.copied_at)
        plan.copied_at, plan.copied = 0, {}

    def publish_copy(self, plan: ResumePlan) -> None:
        """Add the point whose states this step copies before it goes on."""
        moved = self._pool.moved
        place, sources = plan.copied_at, plan.copied
        copies = {g: moved.get(block.block_id) for g, block in sources.items()}
        plan.copied_at, plan.copied = 0, {}
        added = None
        if all(copies.values()):
            ids = {g: block.block_id for g, block in copies.items() if block}
            added = self._add(plan, place, plan.is_junction(place), ids)
        if added is None:
            plan.open.discard(place)
