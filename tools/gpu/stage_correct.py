"""Stage 1: the grouped kernels against float64, over random forests with traps.

Batches are those of ``tests/support/batches.py``: unused slots are NaN, stale ids
stand in block tables, partial last blocks are shared.
"""

import dataclasses
from typing import Any

import torch
from stage import INTERPRET, Result, limit, main

from support import batches
from vllm_radix.attention.cost import Layer
from vllm_radix.attention.plan_buffers import PlanBuffers
from vllm_radix.attention.planner import AttentionPlanner
from vllm_radix_kernels.grouped_attention import grouped_attention
from vllm_radix_kernels.interpreter import interpreted
from vllm_radix_kernels.tiles import choose

DEVICE = torch.device("cpu" if INTERPRET else "cuda")
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 3e-3}
"""Of a row's output: length of the difference over length."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A forest and what attends to it.

    Attributes:
        name: for the result.
        seed: of the forest and of all numbers.
        dtype: of queries.
        kv_dtype: of the cache; None for that of queries.
        layout: of the cache.
        features: whether soft cap, ALiBi and sinks are on.
        heads: query heads, KV heads, head size.
        forest: arguments of ``batches.make_batch``.
    """

    name: str
    seed: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layout: str = "NHD"
    features: bool = False
    heads: tuple[int, int, int] = (32, 8, 128)
    forest: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases() -> list[Case]:
    """Return the cases; interpreted, a few small ones."""
    plain = [Case(f"bf16 seed {seed}", seed) for seed in range(12)]
    kinds = {
        "fp16": {"dtype": torch.float16},
        "fp32": {"dtype": torch.float32},
        "fp8 cache": {"kv_dtype": torch.float8_e4m3fn},
        "HND": {"layout": "HND"},
        "features": {"features": True},
    }
    varied = [
        Case(f"{name} seed {seed}", seed, **fields)  # type: ignore[arg-type]
        for seed in range(20, 24)
        for name, fields in kinds.items()
    ]
    if INTERPRET:
        small = [plain[0], *varied[: len(kinds)]]
        forest = {
            "depth": 2,
            "trees": 2,
            "tail": (1, 20),
            "run": (2, 4),
            "rows": (1, 2),
        }
        fields: dict[str, Any] = {"heads": (4, 1, 32), "forest": forest}
        return [dataclasses.replace(case, **fields) for case in small]
    heads = [(32, 32, 128), (64, 8, 128), (24, 8, 96), (16, 2, 256), (9, 3, 64)]
    return [
        *plain,
        *varied,
        *(Case(f"bf16 heads {one}", 31, heads=one) for one in heads),
        Case("deep", 40, forest={"depth": 6, "trees": 3, "branching": 4}),
        Case("page 32", 41, forest={"page": 32}),
        Case("extends", 42, forest={"rows": (1, 3, 17, 33), "tail": (33, 90)}),
    ]


def compare(case: Case) -> dict[str, Any]:
    """Return how far a case's result is from the reference; raises if it moves."""
    kind = case.kv_dtype or case.dtype
    layer = Layer(*case.heads, kind.itemsize)
    batch = batches.make_batch(case.seed, **case.forest)
    tile = choose("sm_90", layer.head_size, layer.group, case.dtype)
    limits = batches.make_limits(
        batch, layer, tile_rows=tile.m, split=0 if case.seed % 2 else 4
    )
    # Whether it pays is not the question: the plan as it would be.
    plan = AttentionPlanner(limits).propose(batch.tables, batch.seq_lens, batch.starts)
    assert plan is not None, "the limits have room"
    k, v = batches.make_cache(
        batch, layer, case.dtype, case.kv_dtype, case.layout, case.seed
    )
    generator = torch.Generator().manual_seed(case.seed)
    size = (int(batch.starts[-1]), layer.num_heads, layer.head_size)
    q = torch.randn(size, generator=generator).to(case.dtype)
    named: dict[str, Any] = {}
    if case.features:
        named = {
            "softcap": 20.0,
            "slopes": torch.rand(layer.num_heads, generator=generator) * 0.1,
            "sinks": torch.randn(layer.num_heads, generator=generator).to(case.dtype),
        }
    if case.kv_dtype is not None:
        named |= {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(2.0)}
    expected = batches.reference(batch, layer, q, k, v, **named)

    buffers = PlanBuffers(limits, tile, DEVICE)
    loaded = buffers.load(plan)
    loaded.part.fill_(float("nan"))
    loaded.lse.fill_(float("nan"))
    there = [x.to(DEVICE) for x in (q, k, v)]
    assert there[1].stride() == k.stride(), "the layout was lost on the way"
    out = torch.full_like(there[0], float("nan"))
    host = (batch.tables, batch.seq_lens, batch.starts)
    arguments = [*there, out, *(torch.from_numpy(x).to(DEVICE) for x in host), loaded]
    named = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in named.items()
    }

    def call() -> torch.Tensor:
        out.fill_(float("nan"))
        grouped_attention(*arguments, layer.head_size**-0.5, **named)
        return out.cpu()

    if INTERPRET:
        with interpreted():
            result = call()
    else:
        result = call()
        # A result that moves would be a race.
        assert all(torch.equal(result, call()) for _ in range(3)), "it moves"
    wide, right = result.double(), expected.double()
    error = (wide - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)
    worst = float(error.nan_to_num(float("inf")).max())
    bound = BOUNDS[case.dtype] * (2 if case.kv_dtype is not None else 1)
    return {
        "worst": worst,
        "ok": worst <= bound,
        "rows": len(q),
        "nodes": plan.num_nodes,
        "levels": plan.levels,
    }


def run() -> bool:
    """Run the stage; return whether all that was compared is right."""
    result, bad, done = Result("1-correct"), [], 0
    made = cases()
    for case in made:
        value = result.attempt(case.name, compare, case=case)
        done += 1
        if not (value and value["ok"]):
            bad.append(case.name)
        if result.seconds > limit(100):
            break
    result.put("bad", bad)
    result.put("count", f"{done} of {len(made)}")
    return not bad


if __name__ == "__main__":
    main(run)
