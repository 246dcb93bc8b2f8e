"""Plans cover every (row, key) once, follow the batch, and pay."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.batches import (
    Batch,
    DecodeTraffic,
    Layer,
    decode,
    make_batch,
    make_limits,
    plan_of,
)
from support.plan_checks import check_kept_plan, check_plan, shared_tokens, stock_loaded
from vllm_radix.attention.cost import DEVICES, Work, seconds
from vllm_radix.attention.forest import grow_forest
from vllm_radix.attention.planner import AttentionPlanner, Limits

LAYERS = [
    Layer(9, 3, 64, 4),
    Layer(32, 8, 128, 2),
    Layer(4, 4, 64, 2),
    Layer(8, 1, 64, 2),
]

batches = st.builds(
    make_batch,
    seed=st.integers(0, 2**20),
    page=st.sampled_from([1, 2, 8, 16]),
    depth=st.integers(1, 4),
    trees=st.integers(1, 3),
    branching=st.integers(2, 4),
    rows=st.sampled_from([(1,), (1, 1, 3), (1, 7, 20), (2, 33)]),
    tail=st.sampled_from([(1, 1), (1, 40)]),
    padding=st.integers(0, 2),
    alone=st.integers(0, 3),
)


@settings(max_examples=500, deadline=None)
@given(
    batch=batches,
    layer=st.sampled_from(LAYERS),
    tile_rows=st.sampled_from([16, 32, 64]),
    split=st.sampled_from([0, 8, 32]),
)
def test_every_row_sees_every_key_once(batch, layer, tile_rows, split):
    limits = make_limits(batch, layer, tile_rows, split)
    plan = plan_of(batch, limits)
    if plan is not None:
        check_plan(batch, plan, limits)
        rows = max(1, limits.stock_tile_rows // layer.group)
        assert plan.stock_work.loaded == stock_loaded(batch, rows)
        assert plan.levels > 0
        assert plan.num_nodes > 0


@settings(max_examples=200, deadline=None)
@given(batch=batches)
def test_the_forest_holds_what_every_pair_shares(batch):
    full = np.where(batch.rows > 0, (batch.seq_lens - batch.rows) // batch.page, 0)
    forest = grow_forest(batch.tables, full.astype(np.int64))
    count = len(batch.seq_lens)
    found = np.zeros((count, count), dtype=np.int64)
    if forest is not None:
        assert sorted(forest.order.tolist()) == list(range(count))
        for number, node in enumerate(forest.nodes):
            assert node.start < node.end
            assert node.parent < number
            if node.parent >= 0:
                above = forest.nodes[node.parent]
                assert above.end == node.start
                assert above.low <= node.low < node.high <= above.high
            members = forest.order[node.low : node.high]
            found[np.ix_(members, members)] = np.maximum(
                found[np.ix_(members, members)], node.end * batch.page
            )
    for a in range(count):
        for b in range(count):
            if a != b and batch.rows[a] and batch.rows[b]:
                assert found[a, b] == shared_tokens(batch, a, b), (a, b)


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_that_is_kept_still_covers(seed):
    traffic = DecodeTraffic(seed)
    # Few heads: partials are cheap, and what is shared is short.
    limits = make_limits(traffic.batch(), Layer(3, 3, 64, 4), split=16)
    planner = AttentionPlanner(limits)
    planned = 0
    for _ in range(150):
        batch = traffic.batch()
        plan = planner.plan(batch.tables, batch.seq_lens, batch.starts)
        fresh = plan_of(batch, limits)
        if plan is not None:
            check_kept_plan(batch, plan, limits)
        if fresh is not None:
            assert plan is not None
            assert plan.num_nodes == fresh.num_nodes
            planned += 1
        traffic.step()
    assert planned > 30
    assert planner.kept > 10


def test_a_decode_step_without_news_keeps_the_very_plan():
    tables = np.arange(1, 65).reshape(4, 16)
    tables[:, :8] = tables[0, :8]
    planner = AttentionPlanner(make_limits(decode(tables, [140] * 4), LAYERS[0]))
    plans = []
    for length in range(140, 150):
        batch = decode(tables, [length] * 4)
        plans.append(planner.plan(batch.tables, batch.seq_lens, batch.starts))
    assert all(plan is plans[0] for plan in plans)
    # A block filled on the way, and it was nobody else's.
    assert (planner.made, planner.kept) == (1, 9)


def test_own_ranges_that_grew_are_cut_again():
    tables = np.arange(1, 1 + 4 * 64).reshape(4, 64)
    tables[:, :32] = tables[0, :32]
    limits = make_limits(decode(tables, [520] * 4), LAYERS[2], split=64)
    planner = AttentionPlanner(limits)
    partials = []
    for length in range(520, 900):
        batch = decode(tables, [length] * 4)
        plan = planner.plan(batch.tables, batch.seq_lens, batch.starts)
        partials.append(plan.num_partials)
        if length % 16 == 0:
            check_kept_plan(batch, plan, limits)
    assert planner.made == 1
    # Each at least doubles the last cut, so they are few.
    assert planner.refreshed == len(set(partials)) - 1 == 3


def test_blocks_that_fill_into_another_requests_are_noticed():
    tables = np.arange(1, 33).reshape(2, 16)
    tables[1, :4] = tables[0, :4]
    limits = make_limits(decode(tables, [65, 65]), LAYERS[0])
    planner = AttentionPlanner(limits)
    planner.plan(tables, [65, 65], [0, 1, 2])
    tables[1, 4] = tables[0, 4]
    plan = planner.plan(tables, [81, 81], [0, 1, 2])
    assert plan.grouped_tokens == 80
    check_plan(decode(tables, [81, 81]), plan, limits)


def test_a_request_that_got_shorter_shares_less():
    tables = np.array([[1, 2, 3, 4, 5, 6]] * 3)
    limits = make_limits(decode(tables, [81] * 3), LAYERS[0])
    planner = AttentionPlanner(limits)
    for lengths in ([81, 81, 81], [81, 50, 81], [81, 81, 50], [50, 50, 50]):
        plan = planner.plan(tables, lengths, [0, 1, 2, 3])
        check_plan(decode(tables, lengths), plan, limits)


def test_partly_filled_block_is_not_shared():
    tables = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    for length, shared in ((33, 32), (40, 32), (48, 32), (49, 48)):
        batch = decode(tables, [length] * 3)
        plan = plan_of(batch, make_limits(batch, LAYERS[0]))
        # The block that a row writes to is not full before it.
        assert plan.grouped_tokens == shared, length


def test_row_that_writes_inside_a_block_does_not_share_it():
    # The second computes, in this step, the block that the others have cached.
    tables = np.array([[1, 2, 3], [1, 2, 0], [1, 2, 3]])
    batch = Batch(
        tables.astype(np.int32),
        np.array([40, 24, 40], dtype=np.int32),
        np.array([0, 1, 5, 6], dtype=np.int32),
        16,
        10,
    )
    limits = make_limits(batch, LAYERS[0])
    check_plan(batch, plan_of(batch, limits), limits)


def test_the_same_block_below_other_blocks_is_not_shared():
    tables = np.array([[1, 5, 6, 7], [2, 5, 6, 8], [1, 9, 6, 7]])
    batch = decode(tables, [64] * 3)
    limits = make_limits(batch, LAYERS[0])
    plan = plan_of(batch, limits)
    assert plan.grouped_tokens == 16
    check_plan(batch, plan, limits)


def test_drafts_that_may_be_refused_shorten_what_is_shared():
    tables = np.array([[1, 2, 3, 4]] * 8)
    batch = decode(tables, [54] * 8, rows=4)
    for slack, shared in ((0, 48), (4, 32)):
        plan = plan_of(batch, make_limits(batch, LAYERS[2], slack=slack))
        assert plan.grouped_tokens == shared


def on(architecture, layer=LAYERS[1], **fields):
    return Limits(layer, DEVICES[architecture], 16, 64, **fields)


def families(groups, members, shared, own=64):
    """Return decoding requests in groups that share so many blocks."""
    count = groups * members
    tables = np.arange(1, 1 + count * (shared + own)).reshape(count, -1)
    for group in range(groups):
        rows = slice(group * members, (group + 1) * members)
        tables[rows, :shared] = tables[group * members, :shared]
    return decode(tables, [(shared + own) * 16] * count)


def test_nothing_shared_is_vllms():
    assert plan_of(families(8, 1, 0), on("sm_90")) is None
    assert plan_of(families(1, 1, 64), on("interpreter")) is None
    assert plan_of(decode(np.zeros((0, 4)), []), on("interpreter")) is None


def test_a_proposal_covers_even_where_nothing_is_shared():
    for batch in (families(5, 1, 0, own=3), families(2, 2, 1, own=3)):
        limits = on("sm_90")
        assert plan_of(batch, limits) is None
        planner = AttentionPlanner(limits)
        plan = planner.propose(batch.tables, batch.seq_lens, batch.starts)
        check_plan(batch, plan, limits)
        assert (planner.made, planner.kept) == (0, 0)


@pytest.mark.parametrize("architecture", [a for a in DEVICES if a != "interpreter"])
def test_little_is_vllms_and_much_is_ours(architecture):
    limits = on(architecture)
    assert plan_of(families(4, 2, 1), limits) is None
    plan = plan_of(families(1, 32, 512), limits)
    assert plan is not None
    ours = seconds(limits.device, limits.layer, plan.work)
    assert ours < seconds(limits.device, limits.layer, plan.stock_work)


def test_a_node_must_save_more_than_its_partials_cost():
    # One block of 16 tokens saves one reading of 64 KiB; two rows' partials, each
    # written and read twice over, cost 4 x 33 KiB.
    layer = LAYERS[1]
    assert layer.token_bytes * 16 == 65536
    assert layer.partial_bytes == 33024
    assert plan_of(families(1, 2, 2), on("interpreter")) is None
    assert plan_of(families(1, 2, 3), on("interpreter")) is not None


def test_long_prefills_gain_nothing():
    """Tiles that are full by themselves have nothing to share; no promise is made."""
    tables = np.arange(1, 1 + 4 * 200).reshape(4, 200)
    tables[:, :32] = tables[0, :32]
    starts = np.arange(5) * 2048
    plan = AttentionPlanner(on("sm_90")).plan(tables, [512 + 2048] * 4, starts)
    assert plan is None


def test_levels_are_read_one_by_one():
    batch = families(4, 8, 128)
    batch.tables[:, :64] = batch.tables[0, :64]
    limits = make_limits(batch, Layer(8, 8, 64, 4), 16)
    plan = plan_of(batch, limits)
    assert (plan.levels, plan.num_nodes) == (2, 5)
    check_plan(batch, plan, limits)
    # Where its children fill their tiles anyway, a run is theirs.
    wide = plan_of(batch, make_limits(batch, Layer(16, 2, 64, 4), 16))
    assert (wide.levels, wide.num_nodes) == (1, 4)


def test_what_has_no_room_is_vllms():
    batch = families(1, 32, 64)
    assert plan_of(batch, make_limits(batch, LAYERS[0])) is not None
    assert plan_of(batch, make_limits(batch, LAYERS[0], max_items=8)) is None
    assert plan_of(batch, make_limits(batch, LAYERS[0], max_partials=63)) is None
    assert plan_of(batch, make_limits(batch, LAYERS[0], max_tokens=31)) is None


def test_few_requests_with_long_keys_are_cut_for_all_processors():
    batch = families(1, 2, 4096)
    plan = plan_of(batch, on("sm_90"))
    programs = len(plan.items) * LAYERS[1].num_kv_heads
    assert programs >= DEVICES["sm_90"].processors
    assert (plan.items[:-1, 3] <= 4160 * 16).all()


def test_the_model_counts_a_shared_range_once_only_if_the_cache_holds_it():
    device, layer = DEVICES["sm_90"], LAYERS[1]
    fits = int(device.cache_size) // layer.token_bytes
    work = Work(10 * fits, fits, fits, 16, 0, 1)
    time = seconds(device, layer, work) - device.launch_s
    assert time == pytest.approx(10 * fits * layer.token_bytes / device.cache)
    more = dataclasses.replace(work, repeated=fits + 1, unique=fits + 1)
    time = seconds(device, layer, more) - device.launch_s
    assert time == pytest.approx(10 * fits * layer.token_bytes / device.memory)
