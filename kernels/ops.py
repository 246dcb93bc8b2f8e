"""The kernels as torch operators: ``torch.ops.vllm_radix.*``, for ``torch.compile``.

An operator takes a plan's tensors one by one; ``flatten`` spells out a call of
``grouped_attention`` that way. Both operators write to their arguments and return
nothing, so their fake versions have nothing to do.
"""

from typing import Any

import torch

from vllm_radix_kernels import grouped_attention as attention
from vllm_radix_kernels import merge_partials as merging
from vllm_radix_kernels.tiles import Tile


@torch.library.custom_op(
    "vllm_radix::grouped_attention", mutates_args=("out", "part", "lse")
)
def grouped_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    items: torch.Tensor,
    rows: torch.Tensor,
    first: torch.Tensor,
    num_items: torch.Tensor,
    part: torch.Tensor,
    lse: torch.Tensor,
    tile: list[int],
    programs: int,
    num_rows: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Run ``grouped_attention.grouped_attention``; arguments are described there."""
    plan = attention.DevicePlan(
        items, rows, first, num_items, part, lse, Tile(*tile), programs, num_rows
    )
    attention.grouped_attention(
        q,
        k_cache,
        v_cache,
        out,
        tables,
        seq_lens,
        query_starts,
        plan,
        scale,
        window=window,
        softcap=softcap,
        slopes=slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )


@torch.library.custom_op("vllm_radix::merge_partials", mutates_args=("out",))
def merge_partials(
    out: torch.Tensor,
    part: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    first: torch.Tensor,
    num_rows: int,
) -> None:
    """Run ``merge_partials.merge_partials``; arguments are described there."""
    merging.merge_partials(out, part, lse, rows, first, num_rows)


@grouped_attention.register_fake
def _(*_: Any, **__: Any) -> None:
    return None


@merge_partials.register_fake
def _(*_: Any, **__: Any) -> None:
    return None


def flatten(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    plan: attention.DevicePlan,
    scale: float,
) -> list[Any]:
    """Return the operator's arguments for a launch without further features."""
    tile = plan.tile
    return [
        q,
        k_cache,
        v_cache,
        out,
        tables,
        seq_lens,
        query_starts,
        plan.items,
        plan.rows,
        plan.first,
        plan.num_items,
        plan.part,
        plan.lse,
        [tile.m, tile.n, tile.warps, tile.stages],
        plan.programs,
        plan.num_rows,
        scale,
    ]
