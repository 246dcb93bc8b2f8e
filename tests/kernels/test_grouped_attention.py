"""The kernels against float64, over random forests, with traps in the cache."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.batches import (
    Layer,
    agree,
    compute,
    make_batch,
    make_cache,
    make_limits,
    plan_of,
    reference,
    shared,
)
from support.plan_checks import check_plan
from vllm_radix.attention.plan_buffers import PlanBuffers
from vllm_radix_kernels import ops
from vllm_radix_kernels.grouped_attention import grouped_attention
from vllm_radix_kernels.interpreter import Traffic, interpreted
from vllm_radix_kernels.merge_partials import (
    merge_partials,
    merge_partials_reference,
)
from vllm_radix_kernels.tiles import ARCHITECTURES, Tile, choose, table_name

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
FP8 = 1.2e-2


def check(batch, layer, dtype=torch.float32, kv=None, tile=(16, 32), split=0, **more):
    """Plan a batch, compute it, and compare with the reference."""
    layout = more.pop("layout", "NHD")
    limits = make_limits(batch, layer, tile[0], split)
    plan = plan_of(batch, limits)
    assert plan is not None, "nothing grouped: the case tests nothing"
    check_plan(batch, plan, limits)
    generator = torch.Generator().manual_seed(1)
    shape = (int(batch.starts[-1]), layer.num_heads, layer.head_size)
    q = torch.randn(shape, generator=generator).to(dtype)
    k, v = make_cache(batch, layer, dtype, kv, layout)
    if kv is not None:
        more |= {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.3])}
    out = compute(batch, layer, plan, limits, q, k, v, tile_n=tile[1], **more)
    expected = reference(batch, layer, q, k, v, **more)
    agree(out, expected, TOLERANCE[dtype] if kv is None else FP8)
    return plan


HEADS = [(9, 3, 64), (32, 8, 128), (4, 4, 80), (8, 1, 96), (4, 2, 192), (4, 1, 256)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_groups_of_query_heads_and_head_sizes(heads):
    layer = Layer(*heads, 4)
    check(shared(members=9 if layer.num_heads > 16 else 5, blocks=5), layer)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND", "K transposed"])
def test_block_sizes_and_layouts(page, layout):
    batch = shared(blocks=max(1, 64 // page), page=page)
    check(batch, Layer(4, 2, 64, 4), layout=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_types(dtype):
    check(shared(blocks=8, levels=2), Layer(6, 2, 64, 2), dtype)


FP8_TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("kv", FP8_TYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float8_caches_with_scales(kv, dtype):
    check(shared(blocks=12), Layer(4, 2, 64, 1), dtype, kv)


FEATURES = {
    "window": {"window": 40},
    "window of one block": {"window": 16},
    "window of one key": {"window": 1},
    "soft cap": {"softcap": 3.0},
    "ALiBi": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01, 0.3, 0.2])},
    "sinks": {"sinks": torch.tensor([3.0, -1.0, 0.5, 8.0, 0.0, 2.0])},
    "all": {
        "window": 50,
        "softcap": 5.0,
        "slopes": torch.tensor([0.5, 0.25, 0.1, 0.01, 0.3, 0.2]),
        "sinks": torch.tensor([3.0, -1.0, 0.5, 8.0, 0.0, 2.0]),
    },
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("split", [0, 32])
def test_features(name, split):
    batch = shared(blocks=8, levels=2, rows=2)
    check(batch, Layer(6, 2, 64, 4), split=split, **FEATURES[name])


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(1, 4),
    rows=st.sampled_from([(1,), (1, 2, 5), (3, 20)]),
    page=st.sampled_from([16, 32]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    feature=st.sampled_from([{}, *FEATURES.values()]),
    tile=st.sampled_from([(16, 32), (32, 64), (16, 16)]),
    split=st.sampled_from([0, 16, 48]),
)
def test_random_forests(seed, depth, rows, page, dtype, feature, tile, split):
    batch = make_batch(
        seed, page, depth, trees=1, branching=2, run=(2, 4), rows=rows, alone=1
    )
    layer = Layer(6, 2, 32, dtype.itemsize)
    limits = make_limits(batch, layer, tile[0], split)
    if plan_of(batch, limits) is None:
        # Too little is shared for so many partials: share more.
        batch, split = shared(members=7, blocks=6, page=page, levels=2), 0
    check(batch, layer, dtype, tile=tile, split=split, **feature)


def test_a_tile_of_many_requests_at_several_lengths_and_depths():
    batch = make_batch(11, depth=4, trees=1, branching=4, run=(2, 5), rows=(1, 4, 9))
    plan = check(batch, Layer(4, 2, 64, 4), tile=(64, 64))
    assert plan.levels >= 2
    assert plan.num_nodes >= 3


def test_padding_rows_and_programs_without_work_change_nothing():
    """As under a captured graph: more rows, more programs, another plan in place."""
    layer = Layer(4, 2, 64, 4)
    first, second = shared(blocks=8, seed=1), shared(members=3, blocks=9, seed=2)
    limits = make_limits(first, layer)
    tile = Tile(16, 32, 1, 1)
    buffers = PlanBuffers(limits, tile, torch.device("cpu"))
    tables = torch.zeros(8, 40, dtype=torch.int32)
    lengths = torch.zeros(8, dtype=torch.int32)
    starts = torch.zeros(9, dtype=torch.int32)
    q, out = torch.zeros(64, 4, 64), torch.zeros(64, 4, 64)
    pointers = None
    for batch in (first, second, first):
        plan = plan_of(batch, limits)
        count, rows = len(batch.seq_lens), int(batch.starts[-1])
        device = buffers.load(plan)
        buffers._serial = -1
        # Fixed for all: what a graph would have captured.
        device.num_rows, device.programs = 64, 40
        now = [t.data_ptr() for t in (device.items, device.rows, device.first)]
        assert pointers in (None, now)
        pointers = now
        tables.zero_()[:count, : batch.tables.shape[1]] = torch.from_numpy(batch.tables)
        lengths.zero_()[:count] = torch.from_numpy(batch.seq_lens)
        starts.fill_(rows)[: count + 1] = torch.from_numpy(batch.starts)
        q.copy_(torch.randn(q.shape))
        k, v = make_cache(batch, layer)
        out.fill_(7.0)
        with interpreted():
            grouped_attention(q, k, v, out, tables, lengths, starts, device, 0.125)
        agree(out[:rows], reference(batch, layer, q[:rows], k, v), 3e-5)
        assert (out[rows:] == 7.0).all()


def test_loaded_bytes_are_what_the_plan_says():
    for seed in range(2):
        batch = make_batch(seed, depth=3, run=(2, 5), rows=(1, 3))
        layer = Layer(6, 2, 32, 4)
        limits = make_limits(batch, layer, split=32)
        plan = plan_of(batch, limits)
        shape = (int(batch.starts[-1]), 6, 32)
        q, out = torch.randn(shape), torch.empty(shape)
        k, v = make_cache(batch, layer)
        device = PlanBuffers(limits, Tile(16, 32, 1, 1), torch.device("cpu"))
        device = device.load(plan)
        traffic = Traffic(k=k, v=v, part=device.part, lse=device.lse)
        batches = [batch.tables, batch.seq_lens, batch.starts]
        with interpreted(traffic):
            grouped_attention(
                q, k, v, out, *map(torch.from_numpy, batches), device, 0.2
            )
        keys = traffic.loaded["k"] + traffic.loaded["v"]
        assert keys == plan.work.loaded * layer.token_bytes
        partials = sum(
            counted[name]
            for counted in (traffic.loaded, traffic.stored)
            for name in ("part", "lse")
        )
        assert partials == plan.work.partials * layer.partial_bytes


def test_merging_alone():
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(40, 5, 48, generator=generator)
    lse = torch.randn(40, 5, generator=generator) * 20
    lse[3], lse[4, 2] = float("-inf"), float("-inf")
    first = torch.tensor([0, 2, 2, 5, 12, 40, 40], dtype=torch.int32)
    rows = torch.tensor([[3, 0], [1, 0], [5, 0], [0, 0], [4, 0], [2, 0]])
    out = torch.full((6, 5, 48), float("nan"))
    with interpreted():
        merge_partials(out, part, lse, rows.int(), first, 6)
    expected = merge_partials_reference(part, lse, first)
    for number, count in enumerate(np.diff(first.numpy())):
        token = int(rows[number, 0])
        if count:
            agree(out[token], expected[number], 1e-6)
        else:
            assert out[token].isnan().all(), "a row without partials was written"


def test_operators_are_known_to_torch_compile():
    batch, layer = shared(blocks=6), Layer(4, 2, 64, 4)
    limits = make_limits(batch, layer)
    plan = plan_of(batch, limits)
    device = PlanBuffers(limits, Tile(16, 32, 1, 1), torch.device("cpu")).load(plan)
    q = torch.randn(int(batch.starts[-1]), 4, 64)
    k, v = make_cache(batch, layer)
    batches = [
        torch.from_numpy(x) for x in (batch.tables, batch.seq_lens, batch.starts)
    ]
    out = torch.empty_like(q)

    def attend(q, out):
        arguments = ops.flatten(q * 1, k, v, out, *batches, device, 0.125)
        torch.ops.vllm_radix.grouped_attention(*arguments)
        return out + 0

    with interpreted():
        made = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, out)
    agree(made, reference(batch, layer, q, k, v), 3e-5)
    with interpreted():
        torch.library.opcheck(
            torch.ops.vllm_radix.grouped_attention.default,
            tuple(ops.flatten(q, k, v, out, *batches, device, 0.125)),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_what_the_kernel_does_not_take_is_named():
    batch, layer = shared(blocks=6), Layer(4, 2, 64, 4)
    limits = make_limits(batch, layer)
    plan = plan_of(batch, limits)
    q = torch.randn(int(batch.starts[-1]), 4, 64)
    k, v = make_cache(batch, layer)
    for arguments, what in (
        ((q.double(), k, v), "bfloat16, float16, float32"),
        ((q.half(), k, v), "or a float8"),
        ((q, k.to(torch.float8_e5m2), v.to(torch.float8_e5m2)), "k_scale"),
        ((torch.randn(5, 3, 64), k, v), "no multiple of 2 KV heads"),
        ((torch.randn(5, 64, 64), k, v), "smaller than a group"),
        ((torch.randn(5, 64, 4).transpose(1, 2), k, v), "contiguous"),
    ):
        with pytest.raises(ValueError, match=what):
            compute(batch, layer, plan, limits, *arguments)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "interpreter"])
def test_tiles_hold_every_group(architecture):
    for head in (64, 80, 96, 128, 192, 256):
        for group in (1, 3, 7, 8, 16, 71, 128):
            tile = choose(architecture, head, group, torch.bfloat16)
            assert tile.m >= group
            assert math.log2(tile.m).is_integer() and math.log2(tile.n).is_integer()
            assert min(tile.m, tile.n) >= 16


def test_unknown_devices_take_the_nearest_older_row():
    assert table_name("sm_86") == "sm_80"
    assert table_name("sm_103") == "sm_100"
    assert table_name("sm_121") == "sm_120"
    assert table_name("gfx950") == "gfx950"
    for name in ("sm_75", "gfx90a", "gfx1100", "gfx1201", "tpu"):
        with pytest.raises(ValueError, match=name):
            table_name(name)
    with pytest.raises(ValueError, match="512"):
        choose("sm_90", 512, 1, torch.bfloat16)
