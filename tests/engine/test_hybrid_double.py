"""The engine double for several KV cache groups: stock passes, faults do not."""

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import MambaManager

from support.engine_double import WrongReadError
from support.hybrid_double import (
    EVERYTHING,
    LAYOUTS,
    STATE,
    HybridDouble,
    make_hybrid_scheduler,
    not_copying,
)
from support.prompts import prompt
from support.traffic import hybrid_traffic

FULL, WINDOW, CHUNK, STATES = range(4)


@pytest.mark.parametrize(("cls", "lag"), [(Scheduler, 0), (AsyncScheduler, 1)])
@pytest.mark.parametrize("layout", ["full/16", *LAYOUTS])
def test_stock_reads_right_under_random_traffic(layout, cls, lag):
    engines = [hybrid_traffic(layout, seed, cls, lag) for seed in range(8)]
    assert sum(sum(engine.cached.values()) for engine in engines) > 0
    assert sum(len(engine.resumed) for engine in engines) > 3
    if "mamba" in layout:
        assert all(engine.moved > 0 for engine in engines)


@pytest.mark.parametrize(("cls", "lag"), [(Scheduler, 0), (AsyncScheduler, 1)])
def test_stock_reads_right_with_states_inside_blocks(cls, lag):
    engines = [
        hybrid_traffic("full/32+mamba/32x2", seed, cls, lag, prefix_match_unit=8)
        for seed in range(8)
    ]
    assert sum(engine.copied for engine in engines) > 0


def running(layout=EVERYTHING, tokens=100, steps=3, cls=Scheduler):
    """An engine with one request that generates; position 101 comes next."""
    engine = HybridDouble(make_hybrid_scheduler(cls, layout, 80))
    engine.add("one", prompt("one", tokens), max_tokens=40)
    for _ in range(steps):
        engine.step()
    return engine


def block_of(engine, group, position):
    size = engine.specs[group].block_size
    return engine.tables["one"][group][position // size]


def test_an_engine_without_a_fault_reads_right():
    engine = running()
    engine.run()
    assert len(engine.outputs["one"]) == 40


def state_ahead(engine):
    """The state has seen one token too many, as after a step that was dropped."""
    chain = engine._chain_to("one", 102)
    held = engine.blocks[block_of(engine, STATES, 100)][1]
    assert held[STATE] == chain[101]
    held[STATE] = chain[102]


def state_behind(engine):
    engine.blocks[block_of(engine, STATES, 100)][1][STATE] = engine.chains["one"][96]


def state_of_another_request(engine):
    engine.add("two", prompt("two", 100), max_tokens=40)
    engine.step()
    other = engine.tables["two"][STATES][-1]
    engine.blocks[block_of(engine, STATES, 100)] = engine.blocks[other]


def state_not_moved(engine):
    """The step that enters a column finds nothing there."""
    prepare = engine._prepare_states

    def wrong(output, starts):
        with not_copying(engine):
            prepare(output, starts)

    engine._prepare_states = wrong


def swapped(group, first, second):
    def fault(engine):
        a, b = (block_of(engine, group, position) for position in (first, second))
        engine.blocks[a], engine.blocks[b] = engine.blocks[b], engine.blocks[a]

    return fault


def of_another_group(group, other, position):
    """A block went to another group, which wrote the same tokens to it."""

    def fault(engine):
        mine, theirs = (block_of(engine, g, position) for g in (group, other))
        engine.blocks[mine] = engine.blocks[theirs]

    return fault


def null(group, position):
    def fault(engine):
        size = engine.specs[group].block_size
        engine.tables["one"][group][position // size] = 0

    return fault


def one_slot(group, position):
    """One token of a block is another one."""

    def fault(engine):
        size = engine.specs[group].block_size
        engine.blocks[block_of(engine, group, position)][1][position % size] = "wrong"

    return fault


def zeroed(engine):
    del engine.blocks[block_of(engine, FULL, 0)]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (state_ahead, "the state after 101 of group 3"),
        (state_behind, "the state after 101 of group 3"),
        (state_of_another_request, "the state after 102 of group 3"),
        (state_not_moved, "the state after 128 of group 3"),
        (swapped(WINDOW, 64, 80), "position 64 of group 1"),
        (swapped(CHUNK, 64, 80), "position 64 of group 2"),
        (of_another_group(WINDOW, FULL, 80), "of group 1 in .* which holds group 0's"),
        (of_another_group(FULL, CHUNK, 80), "of group 0 in .* which holds group 2's"),
        (of_another_group(STATES, FULL, 100), "of group 3 in .* which holds group 0's"),
        (null(WINDOW, 64), "position 64 of group 1 in block 0"),
        (null(CHUNK, 64), "position 64 of group 2 in block 0"),
        (one_slot(FULL, 0), "position 0 of group 0"),
        (one_slot(WINDOW, 62), "position 62 of group 1"),
        (one_slot(CHUNK, 64), "position 64 of group 2"),
        (zeroed, "position 0 of group 0"),
    ],
)
def test_a_planted_fault_is_read(fault, named):
    engine = running()
    fault(engine)
    with pytest.raises(WrongReadError, match=named):
        engine.run()


@pytest.mark.parametrize(
    "harmless",
    [
        one_slot(WINDOW, 61),
        null(WINDOW, 47),
        one_slot(CHUNK, 63),
        null(CHUNK, 63),
        null(STATES, 63),
    ],
)
def test_what_no_token_reads_may_hold_anything(harmless):
    engine = running()
    harmless(engine)
    engine.run()
    assert len(engine.outputs["one"]) == 40


def test_a_scheduler_that_keeps_too_little_of_a_window_is_caught(monkeypatch):
    read = HybridDouble._first_read
    monkeypatch.setattr(
        HybridDouble,
        "_first_read",
        staticmethod(lambda spec, position: read(spec, max(0, position - 16))),
    )
    with pytest.raises(WrongReadError, match="of group 1"):
        for seed in range(8):
            hybrid_traffic("full/16+swa:64/16x2", seed, Scheduler, 0)


def test_a_scheduler_that_leaves_out_the_copy_of_a_state_is_caught(monkeypatch):
    """Without it the request goes on writing where others resume."""

    def hit_in_place(manager, request_id, index, source, copy):
        manager.req_to_blocks[request_id][index] = copy

    monkeypatch.setattr(MambaManager, "_apply_cow", hit_in_place)
    with pytest.raises(WrongReadError, match="the state after"):
        for seed in range(8):
            hybrid_traffic(
                "full/32+mamba/32x2", seed, Scheduler, 0, prefix_match_unit=8
            )


def test_a_scheduler_that_finds_a_state_of_other_tokens_is_caught(monkeypatch):
    find = MambaManager.find_longest_cache_hit.__func__
    first = {}

    def find_first(cls, block_hashes, max_length, kv_cache_group_ids, *args, **kw):
        found = find(cls, block_hashes, max_length, kv_cache_group_ids, *args, **kw)
        for group, blocks in zip(kv_cache_group_ids, found[0], strict=True):
            if blocks:
                blocks[-1] = first.setdefault(group, blocks[-1])
        return found

    monkeypatch.setattr(MambaManager, "find_longest_cache_hit", classmethod(find_first))
    with pytest.raises(WrongReadError, match="the state after"):
        for seed in range(8):
            first.clear()
            hybrid_traffic("full/32+mamba/32x3", seed, Scheduler, 0)
