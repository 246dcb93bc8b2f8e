"""Does the hybrid double catch bugs? Each one here is planted, and must be caught.

By a wrong read wherever it can lead to one, with the checks of pool and tree off; by
those checks otherwise; or by a count, where too much is computed, or at a wrong place.
"""

from dataclasses import replace

import pytest

from support.engine_double import WrongReadError
from support.hybrid_double import (
    EVERYTHING,
    HybridDouble,
    make_hybrid_scheduler,
    parse_layout,
)
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine.compat import MambaAttentionBackendEnum
from vllm_radix.engine.groups.mamba import MambaGroup
from vllm_radix.engine.holds import Holds
from vllm_radix.engine.hybrid_manager import HybridKVCacheManager
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.resume_plans import ResumePlans
from vllm_radix.engine.state_points import StatePoints
from vllm_radix.tree.resume import Chunk, ResumeTree, State, Window
from vllm_radix.tree.resume.paths import Paths

WINDOWS = "full/16+swa:40/16"
LAYOUTS = [EVERYTHING, WINDOWS, "full/16+chunked:64/16", "full/32+mamba/32x3"]
CHECKS = AssertionError, KeyError
MUTANTS = {}


def mutant(caught_by=WrongReadError, layouts=LAYOUTS, lags=(0, 1)):
    def note(plant):
        MUTANTS[plant.__name__] = plant, caught_by, layouts, lags
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


@mutant(layouts=["full/32+mamba/32x3", "full/16+mamba/64x2", EVERYTHING], lags=[1, 2])
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
    publish = StatePoints.publish_copy

    def wrong(self, plan):
        moved = self._pool.moved
        sources = {b.block_id: b for b in plan.copied.values()}
        self._pool.moved = {i: sources.get(i, b) for i, b in moved.items()}
        publish(self, plan)
        self._pool.moved = moved

    patch.setattr(StatePoints, "publish_copy", wrong)


@mutant(layouts=["full/32+mamba/32x3", "full/16+mamba/64x2"])
def a_state_is_kept_without_a_copy(patch):
    def wrong(self, plan, place):
        self._add(plan, place, shared=True)

    patch.setattr(StatePoints, "_keep", wrong)


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
        ((_, lower),) = upper.children.items()
        for part in (upper, lower):
            part.windows = [{} for _ in part.windows]
        return join(self, upper)

    patch.setattr(Paths, "join", wrong)


@mutant(caught_by=CHECKS)
def blocks_that_nobody_uses_stay_held(patch):
    patch.setattr(HybridBlockPool, "_release", lambda self, blocks: None)


@mutant(caught_by=CHECKS)
def held_blocks_may_be_evicted(patch):
    patch.setattr(ResumeTree, "acquire", lambda self, blocks: None)


@mutant()
def a_request_goes_on_one_token_late(patch):
    look_up = HybridKVCacheManager.get_computed_blocks

    def wrong(self, request, *args):
        blocks, cached, junction = look_up(self, request, *args)
        return blocks, cached + (0 < cached < request.num_tokens - 1), junction

    patch.setattr(HybridKVCacheManager, "get_computed_blocks", wrong)


@mutant(caught_by=CHECKS)
def a_reset_forgets_the_tree(patch):
    patch.setattr(ResumeTree, "reset", lambda self: None)


def first_failure(kind, layouts, lags):
    """Run traffic until a failure of a kind; return it, or the last other, or None."""
    last = None
    for seed in range(48):
        for layout in layouts:
            for lag in lags:
                try:
                    hybrid_traffic(layout, seed, RadixScheduler, lag, kind is CHECKS)
                except Exception as error:
                    if isinstance(error, kind):
                        return error
                    # One of vLLM's assertions may come first, as answers fall.
                    last = error
    return last


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, monkeypatch):
    plant, caught_by, layouts, lags = MUTANTS[name]
    plant(monkeypatch)
    error = first_failure(caught_by, layouts, lags)
    assert error is not None, "nobody noticed"
    assert isinstance(error, caught_by), repr(error)


# -- caught by a count ---------------------------------------------------------


def no_junctions(patch):
    patch.setattr(ResumePlans, "junctions", lambda self, *args: [])


def nobody_is_held(patch):
    patch.setattr(Holds, "behind_plans", lambda self, plans, now: set())
    patch.setattr(Holds, "behind_junctions", lambda self, *args: set())


def nothing_is_left_at_the_end(patch):
    patch.setattr(
        HybridKVCacheManager,
        "_leave",
        lambda self, request: self.plans.pop(request.request_id),
    )


def computed(layout):
    """What four requests compute that share 90 tokens, then what they share more."""
    engine = HybridDouble(
        make_hybrid_scheduler(
            RadixScheduler,
            layout,
            200,
            max_num_batched_tokens=512,
            radix={"min_sub_block_tokens": 1},
        )
    )
    stem = prompt("stem", 90)
    for name in "abcd":
        engine.add(name, [*stem, *prompt(name, 50)], max_tokens=1)
    engine.run()
    engine.add("next", [*stem, *prompt("a", 50), *engine.outputs["a"], 7], max_tokens=1)
    engine.run()
    return engine.computed


@pytest.mark.parametrize(
    "plant",
    [
        None,
        no_junctions,
        nobody_is_held,
        nothing_is_left_at_the_end,
    ],
)
def test_a_planted_waste_is_counted(plant, monkeypatch):
    if plant is not None:
        plant(monkeypatch)
    fewest = 90 + 4 * 50 + 2
    assert (computed(WINDOWS) == fewest) == (plant is None)


@pytest.mark.parametrize("ignored", [False, True])
def test_states_of_delta_nets_are_cut_at_multiples_of_their_chunks(
    ignored, monkeypatch
):
    if ignored:
        monkeypatch.setattr(
            MambaGroup, "component", lambda manager: State(manager.block_size)
        )
    full, *states = parse_layout("full/32+mamba/32x2")
    kind = MambaAttentionBackendEnum.GDN_ATTN
    specs = [full, *(replace(spec, mamba_type=kind) for spec in states)]
    engine = HybridDouble(
        make_hybrid_scheduler(RadixScheduler, specs, 200, max_num_batched_tokens=512)
    )
    stem = prompt("stem", 200)
    for name in "abcd":
        engine.add(name, [*stem, *prompt(name, 50)])
    engine.run()
    cached = {*engine.cached.values()}
    assert cached == ({0, 200} if ignored else {0, 192})


def test_without_a_bug_nothing_is_caught():
    for layout in LAYOUTS:
        for lag in (0, 1):
            hybrid_traffic(layout, 0, RadixScheduler, lag, check=False)
