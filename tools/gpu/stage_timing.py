"""Stage 2: ``make bench-attention`` over 17 shapes, and three more implementations.

SDPA (torch) gets keys and values gathered to one contiguous tensor a request: it reads
as much as vLLM's kernel, without a block table's cost. ``grouped, proposed`` is our
kernel where the planner leaves a shape to vLLM: whether it was right to.
``grouped, finer`` cuts ranges at half the keys.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from stage import INTERPRET, OUT, Result, limit, main

from vllm_radix.attention.planner import OPEN_END, AttentionPlanner, Limits, Plan
from vllm_radix_bench.attention import cli, implementations, measure
from vllm_radix_bench.attention.batches import PAGE, Batch, Shape
from vllm_radix_bench.attention.implementations import Implementation, MissingError

SDPA, PROPOSED, FINER = "SDPA (contiguous)", "grouped, proposed", "grouped, finer"
LARGEST_GATHERED, FINEST = 20e9, 512

SHAPES = (
    Shape(32, 1, 4096, 1, 32, 8),
    Shape(128, 1, 4096, 1, 32, 8),
    Shape(32, 1, 1024, 1, 32, 8),
    Shape(32, 1, 16384, 1, 32, 8),
    Shape(8, 4, 4096, 1, 32, 8),
    Shape(32, 1, 4096, 3, 32, 8),
    # Nothing shared: vLLM's.
    Shape(32, 1, 4096, 0, 32, 8),
    Shape(256, 1, 4096, 1, 32, 8),
    Shape(256, 1, 4096, 3, 32, 8),
    Shape(128, 1, 16384, 2, 32, 8),
    # Where the model says that little is won.
    Shape(8, 1, 1024, 1, 32, 8),
    Shape(128, 1, 1024, 1, 32, 8),
    # Tiles that are full by themselves.
    Shape(32, 16, 4096, 1, 32, 8),
    Shape(32, 1, 4096, 1, 32, 32),
    Shape(32, 1, 4096, 1, 64, 8),
    Shape(8, 1, 16384, 1, 32, 8),
    Shape(2, 1, 4096, 1, 32, 8),
)


def sdpa(batch: Batch) -> Implementation:
    """Return torch's attention on gathered keys; decoding only, or it needs a mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = batch.shape
    implementations.need_gpu(batch.q.device)
    if shape.new_tokens > 1:
        raise MissingError("decoding only")
    if shape.requests * shape.length * shape.layer.token_bytes > LARGEST_GATHERED:
        raise MissingError("too large to gather")
    index = batch.tables[:, : -(-shape.length // PAGE)].long()
    k, v = (
        x[index]
        .reshape(shape.requests, -1, shape.kv_heads, shape.head_size)[:, : shape.length]
        .transpose(1, 2)
        .contiguous()
        for x in (batch.k, batch.v)
    )
    q = batch.q.view(shape.requests, 1, shape.heads, shape.head_size).transpose(1, 2)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def call() -> torch.Tensor:
        with sdpa_kernel(backends):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(batch.q.shape)

    return Implementation(SDPA, call, shape.stock_work(64, splits=True))


def proposed(batch: Batch) -> Implementation:
    """Return our kernel where the planner leaves a batch to vLLM."""
    implementations.need_gpu(batch.q.device)
    limits = implementations.limits_of(batch)
    if AttentionPlanner(limits).plan(*batch.host) is not None:
        raise MissingError("it is taken")
    return implementations.planned(batch, limits, best_plan(batch, limits), PROPOSED)


def finer(batch: Batch) -> Implementation:
    """Return our kernel with ranges cut at half the keys."""
    implementations.need_gpu(batch.q.device)
    limits = implementations.limits_of(batch)
    items = best_plan(batch, limits).items
    cut = items[items[:, 4] != OPEN_END]
    most = int((cut[:, 4] - cut[:, 3]).max(initial=0))
    if most < FINEST:
        raise MissingError("cut as finely as it pays")
    limits = replace(limits, split=most // 2)
    return implementations.planned(batch, limits, best_plan(batch, limits), FINER)


def best_plan(batch: Batch, limits: Limits) -> Plan:
    """Return the planner's proposal; there is one if there is room."""
    plan = AttentionPlanner(limits).propose(*batch.host)
    if plan is None:
        raise MissingError("no room for a plan")
    return plan


def run() -> bool:
    """Run the stage; return whether every shape was timed."""
    if INTERPRET:
        to = str(OUT / "2-attention.json")
        return cli.main(["--interpret", "--output", to]) == 0
    implementations.IMPLEMENTATIONS |= {SDPA: sdpa, PROPOSED: proposed, FINER: finer}
    result, device, good = Result("2-timing"), torch.device("cuda"), True
    path = OUT / "2-one.json"
    for shape in SHAPES:
        try:
            row: dict[str, Any] = measure.run([shape], device, 20, path)["rows"][0]
        except Exception as error:
            result.put(str(shape), {"error": repr(error)[:500]})
            good = False
            continue
        short = {
            name: round(one["cold_s"]["median"] * 1e6, 1)
            if "cold_s" in one
            else one["status"][:60]
            for name, one in row["contenders"].items()
        }
        piece = {"us cold": short, "speedup": row["speedup"], "row": row}
        result.put(str(shape), piece, show=False)
        result.say(f"{shape}: {json.dumps(short)} {json.dumps(row['speedup'])}")
        if result.seconds > limit(150):
            result.put("cut short after", str(shape))
            break
    path.unlink(missing_ok=True)
    return good


if __name__ == "__main__":
    main(run)
