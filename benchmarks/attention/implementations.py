"""Ways to compute a batch's attention: ours, vLLM's, FlashInfer's.

All compute the same from one cache and one batch. FlashInfer gets the requests sorted
as its API needs them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_radix.attention.cost import DEVICES, Work
from vllm_radix.attention.plan_buffers import PlanBuffers, max_partials
from vllm_radix.attention.planner import AttentionPlanner, Limits, Plan
from vllm_radix_bench.attention import vllm_kernel
from vllm_radix_bench.attention.batches import PAGE, Batch
from vllm_radix_kernels.grouped_attention import DevicePlan, grouped_attention
from vllm_radix_kernels.tiles import Tile, architecture_of, choose, table_name

TOLERANCE = 2e-2
"""Of a head's output: length of the difference over length. A plain bound would not
notice a lost page, for averages over many keys are small."""

OURS, VLLM, FLASH, CASCADE = "grouped", "vLLM Triton", "FlashAttention", "FlashInfer"
DECLINED = "left to vLLM"

Row = dict[str, Any]


class MismatchError(Exception):
    """An implementation computes something else."""


class MissingError(Exception):
    """An implementation is not there, or does not take a batch; says why."""


@dataclass
class Implementation:
    """One way to compute a batch's attention.

    Attributes:
        name: for tables.
        call: computes, and returns [T, H, D].
        work: for the cost model; None where it says nothing.
        back: rows of the result for each of the batch's; None for as they are.
        notes: for the record.
        plan: of ours, on the device.
    """

    name: str
    call: Callable[[], torch.Tensor]
    work: Work | None = None
    back: torch.Tensor | None = None
    notes: Row = field(default_factory=dict)
    plan: DevicePlan | None = None


def _tile(batch: Batch) -> tuple[str, Tile]:
    """Return the architecture's name, and the tile of our kernel on it."""
    shape = batch.shape
    architecture = table_name(architecture_of(batch.q.device))
    group = shape.layer.group
    return architecture, choose(architecture, shape.head_size, group, batch.q.dtype)


def limits_of(batch: Batch) -> Limits:
    """Return what the planner plans for on the batch's device."""
    architecture, tile = _tile(batch)
    return Limits(
        layer=batch.shape.layer,
        device=DEVICES[architecture],
        block_size=PAGE,
        tile_rows=tile.m,
        max_tokens=len(batch.q),
        max_partials=max_partials(batch.shape.layer),
    )


def ours(batch: Batch) -> Implementation:
    """Return grouped attention, planned for the batch's device."""
    limits = limits_of(batch)
    plan = AttentionPlanner(limits).plan(*batch.host)
    if plan is None:
        raise MissingError(DECLINED)
    return planned(batch, limits, plan, OURS)


def planned(batch: Batch, limits: Limits, plan: Plan, name: str) -> Implementation:
    """Return our kernel with a plan, under a name."""
    shape, device = batch.shape, batch.q.device
    _, tile = _tile(batch)
    buffers = PlanBuffers(limits, tile, device)
    loaded = buffers.load(plan)
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        grouped_attention(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            loaded,
            shape.head_size**-0.5,
        )
        return out

    notes = {
        "tile": asdict(tile),
        "items": len(plan.items),
        "partials": plan.num_partials,
        "nodes": plan.num_nodes,
        "levels": plan.levels,
    }
    return Implementation(name, call, plan.work, notes=notes, plan=loaded)


def stock(batch: Batch) -> Implementation:
    """Return vLLM's unified Triton kernel, called as its backend calls it."""
    shape, device = batch.shape, batch.q.device
    buffers = vllm_kernel.segment_buffers(
        shape.heads, shape.kv_heads, shape.head_size, shape.requests, device
    )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        vllm_kernel.attend(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            shape.new_tokens,
            shape.length,
            buffers,
        )
        return out

    split = vllm_kernel.splits(shape.requests, shape.new_tokens, shape.kv_heads)
    notes = {"variant": "3D" if split else "2D"}
    return Implementation(VLLM, call, shape.stock_work(16), notes=notes)


def need_gpu(device: torch.device) -> None:
    """Refuse a CPU; what is no Triton kernel is not interpreted."""
    if device.type == "cpu":
        raise MissingError("runs on a GPU only")


def flash(batch: Batch) -> Implementation:
    """Return FlashAttention as vLLM ships it, scheduled as its backend does."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        raise MissingError(str(error)) from None
    shape = batch.shape
    need_gpu(batch.q.device)
    fa_version = get_flash_attn_version(head_size=shape.head_size)
    if fa_version is None:
        raise MissingError("vLLM has no version of it for this device")
    schedule = None
    if fa_version == 3:
        schedule = get_scheduler_metadata(
            batch_size=shape.requests,
            max_seqlen_q=shape.new_tokens,
            max_seqlen_k=shape.length,
            num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=batch.q.dtype,
            cu_seqlens_q=batch.starts,
            page_size=PAGE,
            causal=True,
        )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.q,
            k=batch.k,
            v=batch.v,
            out=out,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=shape.new_tokens,
            seqused_k=batch.seq_lens,
            max_seqlen_k=shape.length,
            softmax_scale=shape.head_size**-0.5,
            causal=True,
            block_table=batch.tables,
            scheduler_metadata=schedule,
            fa_version=fa_version,
        )
        return out

    # The rows that the planner takes its tiles to have.
    return Implementation(
        FLASH,
        call,
        shape.stock_work(64, splits=True),
        notes={"version": int(fa_version)},
    )


def cascade(batch: Batch) -> Implementation:
    """Return FlashInfer's multi-level cascade, one level for each and the tails."""
    try:
        from flashinfer.cascade import MultiLevelCascadeAttentionWrapper
    except ImportError:
        raise MissingError("FlashInfer is not installed") from None
    shape, device = batch.shape, batch.q.device
    need_gpu(device)
    if not shape.levels:
        raise MissingError("nothing is shared")
    tables, new, count = batch.host[0][batch.order], shape.new_tokens, shape.requests
    rows = np.repeat(batch.order * new, new) + np.tile(np.arange(new), count)
    levels: list[list[torch.Tensor]] = [[], [], [], []]
    start = 0
    for nodes, length in [*shape.runs(), (count, shape.own_blocks())]:
        members = np.arange(count) * nodes // count
        starts = np.searchsorted(members, np.arange(nodes + 1))
        last = PAGE if start < shape.prefix // PAGE else (shape.tail - 1) % PAGE + 1
        arrays: tuple[npt.NDArray[Any], ...] = (
            starts * new,
            np.arange(nodes + 1) * length,
            tables[starts[:-1], start : start + length].ravel(),
            np.full(nodes, last),
        )
        for into, array in zip(levels, arrays, strict=True):
            into.append(torch.from_numpy(array.astype(np.int32)).to(device))
        start += length
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(shape.levels + 1, workspace, "NHD")
    wrapper.plan(
        *levels,
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        PAGE,
        causal=True,
        q_data_type=batch.q.dtype,
    )
    index = torch.from_numpy(rows).to(device)
    q, caches = batch.q[index], (batch.k, batch.v)
    return Implementation(
        CASCADE, lambda: wrapper.run(q, caches), back=torch.argsort(index)
    )


IMPLEMENTATIONS = {OURS: ours, VLLM: stock, FLASH: flash, CASCADE: cascade}


def gather(batch: Batch) -> tuple[list[Implementation], dict[str, Row]]:
    """Return the implementations that take a batch, and why the others are none."""
    present, absent = [], {}
    for name, make in IMPLEMENTATIONS.items():
        try:
            present.append(make(batch))
        except MissingError as error:
            absent[name] = {"status": str(error)}
        except Exception as error:
            # What is not ours may refuse a device or a shape in any way.
            if name in (OURS, VLLM):
                raise
            absent[name] = {"status": f"failed: {error!r}"}
    return present, absent


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a head's output, over its length."""
    wide, right = result.double(), expected.double()
    relative = (wide - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)
    return float(relative.nan_to_num(float("inf")).max())


def check(
    batch: Batch, one: Implementation, expected: torch.Tensor | None
) -> torch.Tensor:
    """Return what an implementation computes, in the batch's order.

    Raises:
        MismatchError: it is further from ``expected`` than ``TOLERANCE``.
    """
    result = one.call()
    result = (result if one.back is None else result[one.back]).clone()
    error = 0.0 if expected is None else difference(result, expected)
    one.notes["difference"] = error
    if not (error <= TOLERANCE and bool(result.isfinite().all())):
        raise MismatchError(
            f"{one.name} differs by {error:.3g} (at most {TOLERANCE} of a head's "
            f"output): {batch.shape}"
        )
    return result
