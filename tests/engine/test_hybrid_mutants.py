"""Does the hybrid double catch bugs? Each one here is planted, and must be caught.

By a wrong read wherever it can lead to one, with the checks of pool and tree off; by
those checks otherwise.
"""

import pytest

from support.engine_double import WrongReadError
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine.hybrid_manager import HybridKVCacheManager
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.tree.resume import Chunk, ResumeTree, State, Window
from vllm_radix.tree.resume.paths import Paths

EVERYTHING = "full/16+swa:40/16+chunked:64/16+mamba/32"
WINDOWS = "full/16+swa:40/16"
LAYOUTS = [EVERYTHING, WINDOWS, "full/16+chunked:64/16", "full/32+mamba/32x3"]
CHECKS = AssertionError
MUTANTS = {}


def mutant(caught_by=WrongReadError, layouts=LAYOUTS):
    def note(plant):
        MUTANTS[plant.__name__] = plant, caught_by, layouts
        return plant

    return note


@mutant()
def what_ends_is_said_to_be_one_token_longer(patch):
    leave = HybridKVCacheManager._leave

    def wrong(self, request):
        request.num_computed_tokens += 1
        leave(self, request)
        request.num_computed_tokens -= 1

    patch.setattr(HybridKVCacheManager, "_leave", wrong)


@mutant(layouts=["full/32+mamba/32x3", "full/16+mamba/64x2"])
def a_state_in_flight_counts_for_the_tokens_that_are_known(patch):
    leave = HybridKVCacheManager._leave

    def wrong(self, request):
        done = request.num_computed_tokens
        request.num_computed_tokens = min(done, request.num_tokens)
        leave(self, request)
        request.num_computed_tokens = done

    patch.setattr(HybridKVCacheManager, "_leave", wrong)


@mutant(layouts=[WINDOWS, "swa:48/16"])
def a_window_is_one_block_short(patch):
    first = Window.first_block
    patch.setattr(
        Window,
        "first_block",
        lambda self, n: min(first(self, n) + 1, max(0, n - 1) // self.block_size),
    )


@mutant(layouts=["full/16+chunked:64/16", "chunked:64/16"])
def a_chunk_is_one_block_short(patch):
    first = Chunk.first_block
    patch.setattr(
        Chunk,
        "first_block",
        lambda self, n: min(first(self, n) + 1, max(0, n - 1) // self.block_size),
    )


@mutant()
def a_group_gets_the_blocks_of_another(patch):
    block_at = HybridKVCacheManager._block_at

    def wrong(self, request, copies=None):
        right = block_at(self, request, copies)
        groups = len(self._groups)
        return lambda group, index: right((group + 1) % groups, index)

    patch.setattr(HybridKVCacheManager, "_block_at", wrong)


@mutant(layouts=[EVERYTHING, "full/16+mamba/64x2", "full/32+mamba/32x3"])
def a_point_is_ready_in_the_step_that_writes_it(patch):
    add = ResumeTree.add

    def wrong(self, *args, ready=True, **options):
        return add(self, *args, ready=True, **options)

    patch.setattr(ResumeTree, "add", wrong)


@mutant(layouts=[EVERYTHING, "full/16+mamba/64x2", "full/32+mamba/32x3"])
def a_state_is_kept_where_the_request_goes_on_writing(patch):
    """The source of the copy, in place of the copy."""
    publish = HybridKVCacheManager._publish_copy

    def wrong(self, plan):
        moved = self.block_pool.moved
        sources = {b.block_id: b for b in plan.copied.values()}
        self.block_pool.moved = {i: sources.get(i, b) for i, b in moved.items()}
        publish(self, plan)
        self.block_pool.moved = moved

    patch.setattr(HybridKVCacheManager, "_publish_copy", wrong)


@mutant(layouts=["full/32+mamba/32x3", "full/16+mamba/64x2"])
def a_state_is_kept_without_a_copy(patch):
    def wrong(self, plan, place):
        self._add(plan, place, shared=True)

    patch.setattr(HybridKVCacheManager, "_keep_states", wrong)


@mutant(layouts=["full/32+mamba/32x3"])
def the_state_of_a_block_is_that_of_any_place_in_it(patch):
    resume = ResumeTree.places

    def wrong(self, key, namespace, limit):
        for point, place in resume(self, key, namespace, limit):
            yield point, min(limit, place + 1)

    patch.setattr(ResumeTree, "places", wrong)


@mutant()
def salts_are_ignored(patch):
    patch.setattr(RequestKeys, "namespace", lambda self, request: None)


@mutant(caught_by=(WrongReadError, ValueError))
def a_point_stays_when_what_it_needs_is_evicted(patch):
    """Its blocks go, and it is found all the same."""
    evict = ResumeTree.evict

    def wrong(self, count):
        idle = list(self._uses.idle)[:count]
        return idle or evict(self, count)

    patch.setattr(ResumeTree, "evict", wrong)


@mutant(caught_by=(WrongReadError, ValueError))
def a_dense_block_goes_without_the_points_behind_it(patch):
    def wrong(self, block):
        doomed = [p for p in self._points.values() if block in p.blocks]
        return [freed for point in doomed for freed in self.remove(point)]

    patch.setattr(ResumeTree, "discard", wrong)


@mutant(caught_by=CHECKS)
def a_cut_edge_forgets_its_windows(patch):
    patch.setattr(Paths, "_move_windows", lambda self, edge, upper, lower, at: None)


@mutant(caught_by=CHECKS)
def joined_edges_forget_the_windows_of_one(patch):
    join = Paths.join

    def wrong(self, upper):
        (lower,) = upper.children.values()
        for part in (upper, lower):
            for blocks in part.windows:
                for block in list(blocks.values())[:1]:
                    self.window_of.pop(block)
        return join(self, upper)

    patch.setattr(Paths, "join", wrong)


@mutant(caught_by=CHECKS)
def blocks_that_nobody_uses_stay_held(patch):
    patch.setattr(HybridBlockPool, "_release", lambda self, blocks: None)


@mutant(caught_by=CHECKS)
def held_blocks_may_be_evicted(patch):
    patch.setattr(ResumeTree, "acquire", lambda self, blocks: None)


@mutant(caught_by=CHECKS)
def a_point_keeps_more_than_it_needs(patch):
    first = State.first_block
    patch.setattr(State, "first_block", lambda self, n: max(0, first(self, n) - 1))


@mutant()
def points_that_no_step_will_write_stay(patch):
    leave = HybridKVCacheManager._leave

    def wrong(self, request):
        plan = self.plans.get(request.request_id)
        if plan is not None:
            plan.unwritten.clear()
        leave(self, request)

    patch.setattr(HybridKVCacheManager, "_leave", wrong)


@mutant()
def a_request_goes_on_one_token_late(patch):
    look_up = HybridKVCacheManager.get_computed_blocks

    def wrong(self, request):
        blocks, cached, junction = look_up(self, request)
        return blocks, cached + (0 < cached < request.num_tokens - 1), junction

    patch.setattr(HybridKVCacheManager, "get_computed_blocks", wrong)


@mutant(caught_by=AssertionError)
def a_reset_forgets_the_tree(patch):
    patch.setattr(ResumeTree, "reset", lambda self: None)


def first_failure(check, layouts):
    """Run traffic until something is caught; return what, or None."""
    for seed in range(12):
        for layout in layouts:
            for lag in (0, 1):
                try:
                    hybrid_traffic(layout, seed, RadixScheduler, lag, check)
                except Exception as error:
                    return error
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, monkeypatch):
    plant, caught_by, layouts = MUTANTS[name]
    plant(monkeypatch)
    error = first_failure(caught_by is CHECKS, layouts)
    assert error is not None, "nobody noticed"
    assert isinstance(error, caught_by), repr(error)


def test_without_a_bug_nothing_is_caught():
    for layout in LAYOUTS:
        for lag in (0, 1):
            hybrid_traffic(layout, 0, RadixScheduler, lag, check=False)
