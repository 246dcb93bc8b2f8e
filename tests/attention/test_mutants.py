"""Planted bugs: a suite that lets one live is not good enough.

Each is one edit of a source file, loaded beside the original. A jury of small batches,
the same checks as in the other tests, must convict every one, and acquit the original.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from support import batches as batches_module
from support.batches import (
    DecodeTraffic,
    Layer,
    compute,
    make_batch,
    make_cache,
    make_limits,
    reference,
    shared,
)
from support.plan_checks import check_kept_plan, check_plan
from vllm_radix.attention import planner as planner_module
from vllm_radix_kernels import grouped_attention as attention_module

pytestmark = pytest.mark.interpreted

ROOT = Path(__file__).parents[2]
ATTENTION = ROOT / "kernels" / "grouped_attention.py"
MERGE = ROOT / "kernels" / "merge_partials.py"
PLAN = ROOT / "vllm_radix" / "attention" / "planner.py"
FOREST = ROOT / "vllm_radix" / "attention" / "forest.py"

KERNEL_MUTANTS = {
    "causal edge hides a row's own token": (
        ATTENTION,
        "(offs_n[None, :] <= position[:, None])",
        "(offs_n[None, :] < position[:, None])",
    ),
    "no causal edge inside a tile": (
        ATTENTION,
        "present[None, :] & (offs_n[None, :] <= position[:, None])",
        "present[None, :] & valid[:, None]",
    ),
    "window one key too wide": (
        ATTENTION,
        "position[:, None] - offs_n[None, :] < WINDOW",
        "position[:, None] - offs_n[None, :] <= WINDOW",
    ),
    "window starts at the tile's last row": (
        ATTENTION,
        "earliest = tl.min(tl.where(valid, position, 2147483647), 0)",
        "earliest = tl.max(tl.where(valid, position, -1), 0)",
    ),
    "query heads packed the wrong way round": (
        ATTENTION,
        "head = kv_head * GROUP + offs_m % GROUP",
        "head = kv_head + offs_m % GROUP * num_kv_heads",
    ),
    "block table read one block late": (
        ATTENTION,
        "table_row * table_stride + offs_n // PAGE",
        "table_row * table_stride + (offs_n + 1) // PAGE",
    ),
    "block table of the first request for all": (
        ATTENTION,
        "tables_ptr + table_row * table_stride",
        "tables_ptr + table_row * 0",
    ),
    "old sum not rescaled": (
        ATTENTION,
        "acc = acc * shrink[:, None]",
        "acc = acc * 1.0",
    ),
    "sink counted in every item": (ATTENTION, "is_last == 1,", "is_last >= 0,"),
    "soft cap before the scale": (
        ATTENTION,
        'input_precision="ieee") * score_scale\n            if USE_SOFTCAP',
        'input_precision="ieee")\n            if USE_SOFTCAP',
    ),
    "ALiBi relative to the item's first key": (
        ATTENTION,
        "(offs_n[None, :] - context[:, None])",
        "(offs_n[None, :] - key_start)",
    ),
    "scale of values forgotten": (
        ATTENTION,
        "result = result * tl.load(v_scale_ptr)",
        "result = result * 1.0",
    ),
    "scale of keys taken for that of values": (
        ATTENTION,
        "result = result * tl.load(v_scale_ptr)",
        "result = result * tl.load(k_scale_ptr)",
    ),
    "log-sum-exp to another base": (
        ATTENTION,
        "highest + tl.log2(safe_weight)",
        "highest + tl.log(safe_weight)",
    ),
    "partials of an item all in the first slot": (
        ATTENTION,
        "part = (first + ordinal).to(tl.int64)",
        "part = first.to(tl.int64)",
    ),
    "empty partial weighs like a full one": (
        ATTENTION,
        'tl.where(empty, float("-inf"), highest + tl.log2(safe_weight))',
        "tl.where(empty, 0.0, highest + tl.log2(safe_weight))",
    ),
    "a dropped partial": (MERGE, "range(0, end - first)", "range(0, end - first - 1)"),
    "a first partial of others": (
        MERGE,
        "range(0, end - first)",
        "range(1, end - first)",
    ),
    "merged without weights": (
        MERGE,
        "value * weight[:, None]",
        "value",
    ),
    "merged to the row's place, not its token's": (
        MERGE,
        "token = tl.load(rows_ptr + row * 2).to(tl.int64)",
        "token = row.to(tl.int64)",
    ),
}

PLAN_MUTANTS = {
    "a partly filled block is shared": (
        PLAN,
        "context // self.limits.block_size, 0)",
        "-(-context // self.limits.block_size), 0)",
    ),
    "the block that is written is shared": (
        PLAN,
        "context = np.maximum(lengths - rows - self.limits.slack, 0)",
        "context = np.maximum(lengths - self.limits.slack, 0)",
    ),
    "a split ends one key early": (
        PLAN,
        "items[:, 3] + split)",
        "items[:, 3] + split - 1)",
    ),
    "a split begins one key early": (
        PLAN,
        "items[:, 3] = key_start[which] + part * split",
        "items[:, 3] = key_start[which] + part * split - (part > 0)",
    ),
    "a run that is not split off is lost": (
        PLAN,
        "start, above = place[node.parent] if node.parent >= 0 else (0, -1)",
        "start, above = (node.start, -1)",
    ),
    "own ranges begin at the first key": (
        PLAN,
        "own_start = np.append(ends, 0)[chosen.above_request]",
        "own_start = 0 * np.append(ends, 0)[chosen.above_request]",
    ),
    "partials of two levels collide": (
        PLAN,
        "before[number] = before[above] + splits[above]",
        "before[number] = before[above]",
    ),
    "the last rows of a tile are dropped": (
        PLAN,
        "tiles = -(-(high - low) // per_tile)",
        "tiles = np.maximum((high - low) // per_tile, 1) * (high > low)",
    ),
    "the block table of the request before": (
        PLAN,
        "table = np.concatenate([order[chosen.low], order])",
        "table = np.concatenate([order[np.array(chosen.low) - 1], order])",
    ),
    "tokens in the forest's order": (
        PLAN,
        "starts[order] - row_of[:-1], rows",
        "row_of[:-1] - row_of[:-1], rows",
    ),
    "every split of a row is its last": (
        PLAN,
        "items[:, 6] = own & is_last",
        "items[:, 6] = own",
    ),
    "changed blocks go unnoticed": (
        PLAN,
        "if np.logical_and(differ, batch.inside[:, :width], out=differ).any():",
        "if False:",
    ),
    "other queries go unnoticed": (
        PLAN,
        "or not np.array_equal(starts, batch.starts)",
        "or len(starts) != len(batch.starts)",
    ),
    "shorter requests go unnoticed": (
        PLAN,
        "or int(grown.min(initial=0)) < 0",
        "",
    ),
    "newly common blocks go unnoticed": (
        PLAN,
        "if (beside.sum(0) > 1).any():",
        "if False:",
    ),
    "equal blocks count, whatever stands above them": (
        FOREST,
        "np.where(differ.any(1), np.argmax(differ, axis=1), width)",
        "(~differ).sum(1)",
    ),
    "lengths do not bound what is common": (
        FOREST,
        "common = np.minimum(first, np.minimum(lengths[1:], lengths[:-1]))",
        "common = first",
    ),
    "stale ids behind a request's blocks count": (
        FOREST,
        "blocks = np.where(inside, tables[:, :width], 0)",
        "blocks = np.array(tables[:, :width])",
    ),
}


def mutant(path, old, new, folder):
    """Return the module of a source file with one edit."""
    source = path.read_text()
    assert source.count(old) >= 1, f"{path.name} no longer says {old!r}"
    # From a file, for Triton reads the source of its kernels.
    target = folder / f"mutant_{path.stem}.py"
    target.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(target.stem, target)
    module = importlib.util.module_from_spec(spec)
    sys.modules[target.stem] = module
    spec.loader.exec_module(module)
    return module


def batches():
    rng = torch.Generator().manual_seed(0)
    slopes = torch.rand(6, generator=rng) * 0.3
    yield shared(levels=2, rows=3, blocks=5), 16, {}
    yield shared(members=4, rows=2, blocks=6), 16, {"window": 40}
    yield shared(members=4, blocks=6), 0, {"slopes": slopes}
    yield shared(members=4, blocks=6), 32, {"sinks": slopes * 20}
    yield shared(members=4, blocks=6), 0, {"softcap": 2.0}
    yield shared(members=4, blocks=6), 0, {"k_scale": torch.tensor([0.5])}


def kernel_jury():
    """Compute the batches; fail on the first wrong answer."""
    layer = Layer(6, 2, 32, 4)
    for batch, split, features in batches():
        limits = make_limits(batch, layer, split=split)
        plan = batches_module.plan_of(batch, limits)
        if plan is None:
            plan = batches_module.plan_of(batch, limits := make_limits(batch, layer))
        q = torch.randn(int(batch.starts[-1]), 6, 32)
        kv = None
        if "k_scale" in features:
            kv = torch.float8_e5m2
            features["v_scale"] = torch.tensor([2.0])
        k, v = make_cache(batch, layer, kv_dtype=kv)
        out = compute(batch, layer, plan, limits, q, k, v, **features)
        expected = reference(batch, layer, q, k, v, **features)
        assert float((out.double() - expected).abs().max()) < (0.02 if kv else 3e-5)


def plan_jury():
    """Plan many batches, and sequences of steps; fail on the first wrong plan."""
    _pairs()
    small, wide = Layer(3, 3, 64, 4), Layer(6, 2, 64, 4)
    planned = 0
    for seed, layer in itertools.product(range(40), (small, wide)):
        batch = make_batch(seed, page=4, depth=4, rows=(1, 1, 2, 9), padding=seed % 2)
        limits = make_limits(batch, layer, split=(0, 24)[seed % 2])
        plan = batches_module.plan_of(batch, limits)
        if plan is not None:
            check_plan(batch, plan, limits)
            planned += 1
    assert planned > 30
    for seed in range(12):
        traffic = DecodeTraffic(seed)
        planner = batches_module.AttentionPlanner(
            make_limits(traffic.batch(), small, split=16)
        )
        for step in range(80):
            batch = traffic.batch()
            if step % 7 == 3:
                batch.starts[1:] += 1
                batch.seq_lens[0] += 1
            plan = planner.plan(batch.tables, batch.seq_lens, batch.starts)
            fresh = batches_module.plan_of(batch, planner.limits)
            if plan is not None:
                check_kept_plan(batch, plan, planner.limits)
            # Not to share what is shared is a bug, too.
            if fresh is not None:
                assert plan is not None and plan.num_nodes == fresh.num_nodes
            traffic.step()


def _pairs():
    """The forest says of each pair of requests what the two share."""
    from attention import test_planner

    test_planner.test_partly_filled_block_is_not_shared()
    test_planner.test_the_same_block_below_other_blocks_is_not_shared()
    test_planner.test_blocks_that_fill_into_another_requests_are_noticed()
    test_planner.test_a_request_that_got_shorter_shares_less()
    test_planner.test_row_that_writes_inside_a_block_does_not_share_it()


def test_the_juries_acquit_the_original():
    kernel_jury()
    plan_jury()


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_kernel_mutants_are_caught(name, tmp_path, monkeypatch):
    path, old, new = KERNEL_MUTANTS[name]
    module = mutant(path, old, new, tmp_path)
    if path == MERGE:
        monkeypatch.setattr(attention_module, "merge_partials", module.merge_partials)
    else:
        monkeypatch.setattr(
            batches_module, "grouped_attention", module.grouped_attention
        )
    with pytest.raises((AssertionError, IndexError)):
        kernel_jury()


@pytest.mark.parametrize("name", PLAN_MUTANTS)
def test_planner_mutants_are_caught(name, tmp_path, monkeypatch):
    path, old, new = PLAN_MUTANTS[name]
    module = mutant(path, old, new, tmp_path)
    if path == FOREST:
        monkeypatch.setattr(planner_module, "grow_forest", module.grow_forest)
    else:
        for place in ("support.batches", "attention.test_planner"):
            monkeypatch.setattr(f"{place}.AttentionPlanner", module.AttentionPlanner)
    # The other where a plan is missing: the model sees that it loads too much.
    with pytest.raises((AssertionError, AttributeError)):
        plan_jury()
