"""The scheduler over several cache groups: reads are right, and few tokens computed."""

import time
from math import gcd

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import MambaSpec

from support.hybrid_double import (
    EVERYTHING,
    LAYOUTS,
    HybridDouble,
    make_hybrid_scheduler,
    parse_layout,
)
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine.holds import Holds
from vllm_radix.engine.state_points import StatePoints
from vllm_radix.policy import StepCapacity, WaitingRequest, WaitingTree

WITH_EVERYTHING = [*LAYOUTS, EVERYTHING]
LAGS = [0, 1]
EXACT = {"min_sub_block_tokens": 1}


def engine_of(layout, cls=RadixScheduler, lag=0, num_blocks=400, **options):
    options = {"max_num_batched_tokens": 512, "max_num_seqs": 16, **options}
    scheduler = make_hybrid_scheduler(cls, layout, num_blocks, bool(lag), **options)
    return HybridDouble(scheduler, lag)


def run(engine, prompts, at_once=True, max_tokens=3):
    for name, tokens in prompts.items():
        engine.add(name, tokens, max_tokens)
        if not at_once:
            engine.run()
    engine.run()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return engine


def shared_tokens(one, other):
    """How many tokens two prompts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def fewest(prompts, max_tokens=3):
    """What must be computed if each request goes on where it parts from the others."""
    total, seen = 0, []
    for tokens in prompts.values():
        shared = [shared_tokens(tokens, other) for other in seen]
        total += len(tokens) - min(max(shared, default=0), len(tokens) - 1)
        total += max_tokens - 1
        seen.append(tokens)
    return total


def documents(questions=4):
    """Instructions, one of three documents, a question; shuffled."""
    instructions = prompt("instructions", 70)
    texts = [prompt(("text", i), 150) for i in range(3)]
    return {
        f"{q}-{d}": [*instructions, *text, *prompt((q, d), 20)]
        for q in range(questions)
        for d, text in enumerate(texts)
    }


def fork_tree():
    """The nine leaves of a tree that forks in three, twice."""
    stem, leaves = prompt("stem", 90), {}
    for a in range(3):
        branch = [*stem, *prompt(a, 75)]
        for b in range(3):
            leaves[f"{a}{b}"] = [*branch, *prompt((a, b), 50)]
    return {name: leaves[name] for name in sorted(leaves, key=lambda n: n[::-1])}


# -- random traffic ------------------------------------------------------------


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_random_traffic_reads_right(layout, lag):
    # What fits depends on the time that things take: enough runs to find something.
    engines = [hybrid_traffic(layout, seed, RadixScheduler, lag) for seed in range(7)]
    assert sum(sum(engine.cached.values()) for engine in engines) > 0
    assert sum(len(engine.resumed) for engine in engines) > 0
    assert sum(engine.copied for engine in engines) > 0
    if "mamba" in layout:
        assert all(engine.moved > 0 for engine in engines)


@pytest.mark.parametrize("layout", [EVERYTHING, "full/16+mamba/64x2"])
@pytest.mark.parametrize(("lag", "priority"), [(2, False), (0, True), (1, True)])
def test_random_traffic_reads_right_in_other_orders(layout, lag, priority):
    """More steps ahead, as with a pipeline; and preempted within a step."""
    for seed in range(5, 8):
        hybrid_traffic(layout, seed, RadixScheduler, lag, priority=priority)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize(
    "options",
    [
        {"long_prefill_token_threshold": 24},
        {"radix": {"hold": False, **EXACT}},
        {"radix": {"policy": "fcfs"}},
    ],
    ids=str,
)
def test_random_traffic_reads_right_with_other_options(options, lag):
    for layout in (EVERYTHING, "full/16+swa:40/32"):
        for seed in range(20, 22):
            hybrid_traffic(layout, seed, RadixScheduler, lag, **options)


@pytest.mark.parametrize("cls", [Scheduler, RadixScheduler])
@pytest.mark.parametrize("layout", [*LAYOUTS, "full/16+chunked:64/16"])
def test_random_traffic_reads_right_with_drafts(layout, cls):
    """Wrong ones are written behind what is known, and written over."""
    engines = [hybrid_traffic(layout, seed, cls, drafts=3) for seed in range(30, 34)]
    assert all(engine.accepted > 20 for engine in engines)
    assert sum(len(engine.resumed) for engine in engines) > 0
    if cls is RadixScheduler:
        assert sum(engine.copied for engine in engines) > 0


@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_with_whole_blocks_alone_hits_end_where_stocks_may(layout):
    """Beside smaller blocks stock finds states inside blocks, and copies them."""
    specs = parse_layout(layout)
    sizes = [spec.block_size for spec in specs]
    inside = len({*sizes}) > 1 and any(isinstance(s, MambaSpec) for s in specs)
    for seed in range(2):
        engine = hybrid_traffic(layout, seed, radix={"sub_block": False})
        unit = gcd(*sizes) if inside else max(sizes)
        assert not any(cached % unit for cached in engine.cached.values())
        assert inside or engine.copied == 0


def test_with_whole_blocks_alone_and_a_unit_hits_end_at_units():
    engines = [
        hybrid_traffic(
            "full/32+mamba/32x2", seed, radix={"sub_block": False}, prefix_match_unit=8
        )
        for seed in range(3)
    ]
    cached = {tokens for engine in engines for tokens in engine.cached.values()}
    assert not any(tokens % 8 for tokens in cached)
    assert any(tokens % 32 for tokens in cached)


def test_windows_that_this_step_writes_are_not_copied():
    """Where the last parts from the first, the window is the second's alone."""
    options = {"radix": {"hold": False, **EXACT}}
    options["prefix_cache_retention_interval"] = 0
    engine = engine_of("full/16+swa:40/16", **options)
    first = prompt("first", 200)
    run(engine, {"first": first})
    second, third = ([*first[:n], *prompt(n, 20)] for n in (90, 75))
    run(engine, {"second": second, "third": third})
    assert engine.cached == {"first": 0, "second": 0, "third": 0}


# -- counts --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 48])
@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("load", [documents, fork_tree])
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_of_a_backlog_only_the_fewest_tokens_are_computed(layout, load, lag, chunk):
    engine = engine_of(layout, lag=lag, radix=EXACT, long_prefill_token_threshold=chunk)
    prompts = load()
    run(engine, prompts)
    assert engine.computed == fewest(prompts)


@pytest.mark.parametrize("interval", [None, 0, 64])
@pytest.mark.parametrize("load", [documents, fork_tree])
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_one_by_one_it_computes_no_more_than_stock(layout, load, interval):
    options = {}
    if "swa" in layout or "mamba" in layout:
        options["prefix_cache_retention_interval"] = interval
    computed = {
        cls: run(engine_of(layout, cls, **options), load(), at_once=False).computed
        for cls in (Scheduler, RadixScheduler)
    }
    assert computed[RadixScheduler] <= computed[Scheduler]


@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_identical_prompts_are_computed_once(layout):
    """As of a request with n > 1."""
    engine = engine_of(layout, radix=EXACT)
    tokens = prompt("same", 101)
    run(engine, {f"{i}_of_4": tokens for i in range(4)}, max_tokens=5)
    assert engine.computed == 101 + 3 + 4 * 4
    assert len({tuple(answer) for answer in engine.outputs.values()}) == 1


@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_the_next_turn_goes_on_where_the_last_one_ended(layout):
    engine = engine_of(layout, radix=EXACT)
    said = prompt("hello", 85)
    run(engine, {"0": said}, max_tokens=22)
    said = [*said, *engine.outputs["0"], *prompt("more", 15)]
    run(engine, {"1": said})
    assert engine.cached["1"] == 85 + 21


@pytest.mark.parametrize("options", [EXACT, {"sub_block": False}])
def test_with_a_unit_a_prompt_sent_again_goes_on_at_its_last_unit_as_with_stock(
    options,
):
    prompts = dict.fromkeys(("first", "again"), prompt("one", 90))
    for cls in (Scheduler, RadixScheduler):
        engine = engine_of(
            "full/32+mamba/32x2", cls, radix=options, prefix_match_unit=8
        )
        assert run(engine, prompts, at_once=False).cached["again"] == 88


# -- holding -------------------------------------------------------------------


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_followers_are_held_until_the_point_is_written(layout, lag):
    engine = engine_of(layout, lag=lag, radix=EXACT, max_num_batched_tokens=64)
    shared = prompt("shared", 150)
    for name in "abc":
        engine.add(name, [*shared, *prompt(name, 30)])
    seen = []
    while len(engine.admitted) < 3:
        engine.step()
        plans = engine.scheduler.kv_cache_manager.plans
        seen.append((len(engine.admitted), any(plan.open for plan in plans.open())))
    assert (1, True) in seen, "the leader computes what the others wait for"
    assert all(admitted == 1 for admitted, still_open in seen if still_open)
    engine.run()
    assert engine.cached == {"a": 0, "b": 150, "c": 150}


def test_a_leader_that_is_aborted_holds_nobody():
    engine = engine_of(EVERYTHING, radix=EXACT, max_num_batched_tokens=64)
    shared = prompt("shared", 150)
    for name in "ab":
        engine.add(name, [*shared, *prompt(name, 30)])
    engine.step()
    assert engine.admitted == ["a"]
    engine.abort("a")
    engine.run()
    assert engine.admitted == ["a", "b"]
    # As far as the leader came.
    assert engine.cached["b"] == 64
    assert len(engine.outputs["b"]) == 4


def holds_of(entries):
    tree = WaitingTree(4)
    waiting = {entry.id: entry for entry in entries}
    may_wait = {entry.id: True for entry in entries}
    holds = Holds(tree, waiting, lambda entry, now: may_wait[entry.id], 1)
    return holds, may_wait


@pytest.mark.parametrize(
    ("blocks", "slots", "late"),
    [
        (100, 9, set()),
        (69, 9, {"large"}),
        (29, 9, {"large", "small"}),
        (100, 2, {"large", "small"}),
    ],
)
def test_those_that_came_later_leave_room_for_those_that_are_held(blocks, slots, late):
    entries = [
        WaitingRequest("before", 0, blocks=10, tokens=10),
        WaitingRequest("held", 1, blocks=30, cached=10, tokens=30),
        WaitingRequest("large", 2, blocks=40, tokens=40),
        WaitingRequest("warm", 3, blocks=50, cached=45, tokens=50),
        WaitingRequest("small", 4, blocks=20, tokens=20),
    ]
    holds, may_wait = holds_of(entries)
    room = StepCapacity(slots, 1000, blocks)
    assert holds.leave_room({"held"}, room, dense=True, now=0.0) == late
    # Nobody has to leave room for none.
    assert holds.leave_room(set(), room, dense=True, now=0.0) == set()
    may_wait["large"] = False
    assert "large" not in holds.leave_room({"held"}, room, dense=True, now=0.0)


def test_states_of_what_is_cached_are_memory_of_ones_own():
    entries = [
        WaitingRequest("held", 0, blocks=30, cached=20, tokens=30),
        WaitingRequest("late", 1, blocks=40, tokens=40),
    ]
    holds, _ = holds_of(entries)
    room = StepCapacity(9, 1000, 60)
    assert holds.leave_room({"held"}, room, dense=True, now=0.0) == set()
    assert holds.leave_room({"held"}, room, dense=False, now=0.0) == {"late"}


# -- leaving -------------------------------------------------------------------


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
@pytest.mark.parametrize("length", [62, 64, 65])
def test_an_answer_that_stops_early_leaves_what_was_read_alone(layout, lag, length):
    """With a lag, the next step has put one token more into the states."""
    engine = engine_of(layout, lag=lag, radix=EXACT)
    tokens = prompt(length, length)
    engine.add("stops", tokens, max_tokens=30, stop=range(60))
    engine.run()
    assert len(engine.outputs["stops"]) == 1
    for number, end in enumerate((1, 7, 1)):
        more = [*tokens, *engine.outputs["stops"], end, *prompt(end, 20)]
        run(engine, {str(number): more})
    assert engine.cached["0"] == length + lag
    assert engine.cached["1"] >= length + lag
    assert engine.cached["2"] >= length + lag


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_a_preempted_request_goes_on_where_it_was(layout, steps, lag):
    computed = {}
    for preempted in (False, True):
        engine = engine_of(layout, lag=lag, radix=EXACT, max_num_batched_tokens=64)
        request = engine.add("one", prompt("one", 150), max_tokens=40)
        for _ in range(steps):
            engine.step()
        if preempted:
            while engine.in_flight:
                engine._take_in(*engine.in_flight.popleft())
            engine.scheduler.running.remove(request)
            engine.scheduler._preempt_request(request, time.monotonic())
        engine.run()
        computed[preempted] = engine.computed
        assert len(engine.outputs["one"]) == 40
    assert computed[True] - computed[False] <= lag
    assert engine.resumed == ["one"]


@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_what_an_aborted_request_computed_is_kept(layout):
    engine = engine_of(layout, radix=EXACT, max_num_batched_tokens=64)
    tokens = prompt("one", 150)
    engine.add("aborted", tokens)
    engine.step()
    engine.step()
    engine.abort("aborted")
    run(engine, {"again": tokens})
    assert engine.cached["again"] == 128


@pytest.mark.parametrize("layout", WITH_EVERYTHING)
def test_a_reset_preempts_and_forgets(layout):
    engine = engine_of(layout, radix=EXACT)
    prompts = documents(2)
    for name, tokens in prompts.items():
        engine.add(name, tokens, max_tokens=6)
    for _ in range(3):
        engine.step()
    assert not engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.tree.stats().cached_blocks == 0
    pool.check()
    engine.run()
    assert [len(answer) for answer in engine.outputs.values()] == [6] * len(prompts)


def test_copies_are_cancelled_when_memory_is_short(monkeypatch):
    cancelled = []
    cancel = StatePoints.copy_nothing

    def counted(self, plan):
        cancelled.append(plan.copied_at)
        cancel(self, plan)

    monkeypatch.setattr(StatePoints, "copy_nothing", counted)
    for seed in range(4):
        hybrid_traffic("full/16+mamba/64x2", seed)
    assert cancelled


# -- who may share -------------------------------------------------------------


@pytest.mark.parametrize("layout", [EVERYTHING, "full/16+swa:40/32"])
def test_salts_and_adapters_never_share(layout):
    engine = engine_of(layout, radix=EXACT)
    tokens = prompt("same", 130)
    adapters = [LoRARequest(name, i + 1, f"/{name}") for i, name in enumerate("ab")]
    engine.add("plain", tokens)
    engine.add("salt 1", tokens, cache_salt="one")
    engine.add("salt 2", tokens, cache_salt="two")
    engine.add("lora a", tokens, lora_request=adapters[0])
    engine.add("lora b", tokens, lora_request=adapters[1])
    engine.run()
    assert set(engine.cached.values()) == {0}
    engine.add("salt 1 again", tokens, cache_salt="one")
    engine.add("lora b again", tokens, lora_request=adapters[1])
    engine.run()
    assert engine.cached["salt 1 again"] == engine.cached["lora b again"]
    assert engine.cached["salt 1 again"] >= 128


@pytest.mark.parametrize("layout", [EVERYTHING, "full/16+swa:40/32"])
def test_prompts_that_tokens_do_not_tell_go_on_at_ends_of_blocks(layout, monkeypatch):
    """As those with pictures: here every request is taken for one."""
    engine = engine_of(layout, radix=EXACT)
    manager = engine.scheduler.kv_cache_manager
    monkeypatch.setattr(manager.block_pool.keys, "is_plain", lambda request: False)
    prompts = documents()
    run(engine, prompts, at_once=False)
    run(engine, {f"{name} again": tokens for name, tokens in prompts.items()})
    again = [engine.cached[f"{name} again"] for name in prompts]
    assert {*again} == {239 // manager._whole * manager._whole}
