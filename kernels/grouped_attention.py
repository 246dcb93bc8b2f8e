"""Attention over a forest of shared prefixes: each shared range is read once.

A work *item* is one range of keys and one tile of query rows. The rows of a tile may
come from any number of requests, as long as all of them have these keys in the same
blocks; the query heads of one KV head lie side by side in the tile (GQA packing), so
a range that 16 decoding requests share is one tile instead of 16. A row whose keys are
spread over several items leaves a partial result for each, with the log-sum-exp of its
scores, and ``merge_partials`` joins them (the flash-decoding recurrence; see Dao et
al., "Flash-Decoding for long-context inference", 2023; grouping by shared prefix as in
Juravsky et al., "Hydragen", 2024, and Pan et al., "FastTree", 2025).

``vllm_radix/attention/planner.py`` plans the items. The layout of a plan:

    items [N, 8] int32   request whose block table is read, first row, number of rows,
                         first key, end of keys, number of the partial among its row's,
                         1 if the item holds its rows' own last tokens, unused
    rows  [T, 2] int32   token, request; a tile is a run of rows
    first [T + 1] int32  first partial of each row; a row with one item has none

The grid is fixed and walks the list up to ``num_items``, which is read on the device:
a launch can be captured in a CUDA graph and replayed over another plan. Causality,
windows and lengths come from the device's own ``seq_lens`` and ``query_starts``, so a
plan stays right while sequences grow.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_radix_kernels.merge_partials import merge_partials
from vllm_radix_kernels.tiles import Tile

ITEM = 8
"""Fields of an item."""

OPEN_END = 2**31 - 1
"""End of keys of an item that goes up to its rows' own positions."""

LOG2E = tl.constexpr(1.4426950408889634)


# As wide as a model's longest request: no reason to compile anew.
@triton.jit(do_not_specialize=["table_stride"])
def grouped_attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    seq_lens_ptr,
    starts_ptr,
    items_ptr,
    rows_ptr,
    first_ptr,
    num_items_ptr,
    slopes_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    softcap,
    num_kv_heads,
    num_heads,
    table_stride,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    v_stride_d,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_ALIBI: tl.constexpr,
    USE_SINKS: tl.constexpr,
    FP8_KV: tl.constexpr,
):
    """Compute the items of a plan; see the module for their layout.

    Queries and output are [T, H, D]; keys and values [blocks, PAGE, KV heads, D] by
    strides, so that any order of their dimensions does; partials [P, H, D] float32
    and their base-2 log-sum-exp [P, H] float32. The rest is of
    ``grouped_attention``.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_PADDED)
    in_head = offs_d < HEAD
    total = tl.load(num_items_ptr) * num_kv_heads
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        item_ptr = items_ptr + (work // num_kv_heads) * 8
        kv_head = work % num_kv_heads
        table_row = tl.load(item_ptr)
        row_start = tl.load(item_ptr + 1)
        num_rows = tl.load(item_ptr + 2)
        key_start = tl.load(item_ptr + 3)
        key_end = tl.load(item_ptr + 4)
        ordinal = tl.load(item_ptr + 5)
        is_last = tl.load(item_ptr + 6)

        # -- the tile's rows: BLOCK_M // GROUP tokens x GROUP heads
        valid = offs_m // GROUP < num_rows
        row = row_start + offs_m // GROUP
        head = kv_head * GROUP + offs_m % GROUP
        token = tl.load(rows_ptr + row * 2, mask=valid, other=0)
        request = tl.load(rows_ptr + row * 2 + 1, mask=valid, other=0)
        seq_len = tl.load(seq_lens_ptr + request, mask=valid, other=0)
        query_end = tl.load(starts_ptr + request + 1, mask=valid, other=0)
        position = seq_len - query_end + token
        q_offset = token.to(tl.int64) * q_stride_t + head * q_stride_h
        q = tl.load(
            q_ptr + q_offset[:, None] + offs_d[None, :],
            mask=valid[:, None] & in_head[None, :],
            other=0.0,
        )
        k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_h
        k_head_ptr = k_head_ptr + offs_d[:, None] * k_stride_d
        v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_h
        v_head_ptr = v_head_ptr + offs_d[None, :] * v_stride_d
        if USE_ALIBI:
            slope = tl.load(slopes_ptr + head, mask=valid, other=0.0) * LOG2E
            query_start = tl.load(starts_ptr + request, mask=valid, other=0)
            context = seq_len - (query_end - query_start)

        # -- the keys that any row of the tile sees
        last = tl.max(tl.where(valid, position, -1), 0)
        key_end = tl.minimum(key_end, last + 1)
        if WINDOW > 0:
            earliest = tl.min(tl.where(valid, position, 2147483647), 0)
            key_start = tl.maximum(key_start, earliest - WINDOW + 1)

        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total_weight = tl.zeros([BLOCK_M], tl.float32)
        if USE_SINKS:
            # A sink is one more score, without a value: it enters once per row.
            sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
            highest = tl.where(is_last == 1, sink * LOG2E, highest)
            total_weight = tl.where(is_last == 1, 1.0, total_weight)
        acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
        score_scale = scale
        if FP8_KV:
            score_scale = scale * tl.load(k_scale_ptr)

        for key in range(key_start, key_end, BLOCK_N):
            offs_n = key + tl.arange(0, BLOCK_N)
            present = offs_n < key_end
            block = tl.load(
                tables_ptr + table_row * table_stride + offs_n // PAGE,
                mask=present,
                other=0,
            ).to(tl.int64)
            slot = offs_n % PAGE
            k_mask, v_mask = present[None, :], present[:, None]
            if HEAD < HEAD_PADDED:
                k_mask = k_mask & in_head[:, None]
                v_mask = v_mask & in_head[None, :]
            k_offset = block * k_stride_b + slot * k_stride_s
            v_offset = block * v_stride_b + slot * v_stride_s
            k = tl.load(k_head_ptr + k_offset[None, :], mask=k_mask, other=0.0)
            v = tl.load(v_head_ptr + v_offset[:, None], mask=v_mask, other=0.0)
            if FP8_KV:
                k = k.to(q.dtype)
                v = v.to(q.dtype)
            score = tl.dot(q, k, input_precision="ieee") * score_scale
            if USE_SOFTCAP:
                # tanh by exp2, of the side that cannot overflow.
                fall = tl.exp2(tl.abs(score) * (-2.8853900817779268 / softcap))
                size = softcap * (1.0 - fall) / (1.0 + fall)
                score = tl.where(score < 0, -size, size)
            score = score * LOG2E
            if USE_ALIBI:
                score += slope[:, None] * (offs_n[None, :] - context[:, None])
            seen = present[None, :] & (offs_n[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (position[:, None] - offs_n[None, :] < WINDOW)
            score = tl.where(seen, score, float("-inf"))

            new_highest = tl.maximum(highest, tl.max(score, 1))
            # Rows that have seen nothing yet: any base but -inf.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(highest - base)
            total_weight = total_weight * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            highest = new_highest

        # -- a row's only item writes its output, others a partial; looked up again
        # here, for the loop needs the registers
        token = tl.load(rows_ptr + row * 2, mask=valid, other=0)
        first = tl.load(first_ptr + row, mask=valid, other=0)
        direct = tl.load(first_ptr + row + 1, mask=valid, other=0) == first
        empty = total_weight == 0.0
        safe_weight = tl.where(empty, 1.0, total_weight)
        result = acc / safe_weight[:, None]
        if FP8_KV:
            result = result * tl.load(v_scale_ptr)
        out_offset = token.to(tl.int64) * out_stride_t + head * out_stride_h
        tl.store(
            out_ptr + out_offset[:, None] + offs_d[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=(valid & direct)[:, None] & in_head[None, :],
        )
        part = (first + ordinal).to(tl.int64) * num_heads + head
        tl.store(
            part_ptr + part[:, None] * HEAD + offs_d[None, :],
            result,
            mask=(valid & ~direct)[:, None] & in_head[None, :],
        )
        lse = tl.where(empty, float("-inf"), highest + tl.log2(safe_weight))
        tl.store(lse_ptr + part, lse, mask=valid & ~direct)


@dataclass
class DevicePlan:
    """A plan on the device; its tensors stay where they are from step to step.

    Attributes:
        items: [N, 8] int32, see the module.
        rows: [T, 2] int32.
        first: [T + 1] int32.
        num_items: [1] int32, items in use.
        part: [P, H, D] float32, room for partial results.
        lse: [P, H] float32, room for their log-sum-exps.
        tile: how the kernel is cut up.
        programs: programs of a launch; a multiple of the device's processors.
        num_rows: rows in use, or as many as a captured graph may ever have.
    """

    items: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor
    num_items: torch.Tensor
    part: torch.Tensor
    lse: torch.Tensor
    tile: Tile
    programs: int
    num_rows: int


def grouped_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write causal attention over a paged cache to ``out``, as planned.

    Reads each item's keys once for its tile: O(sum over items of keys x D) bytes per
    KV head, plus two passes over the partials. Allocates nothing.

    Args:
        q: [T, H, D] bf16, fp16 or fp32; D contiguous.
        k_cache: [blocks, page, KV heads, D], any strides; q's type, or a float8.
        v_cache: the same.
        out: [T, H, D], written for the rows of the plan; D contiguous.
        tables: [R, W] int32, blocks of each request.
        seq_lens: [R] int32, tokens of each request, with this step's.
        query_starts: [R + 1] int32, first row of each request in ``q``.
        plan: what to compute.
        scale: factor of the scores.
        window: how many keys a row sees, itself included; 0 for all.
        softcap: bound of the scores by tanh; 0 for none.
        slopes: [H] float32, ALiBi; the bias is slope x (key - context length).
        sinks: [H], a further score of each row, without a value.
        k_scale: [1] float32, of float8 keys.
        v_scale: [1] float32, of float8 values.

    Raises:
        ValueError: shapes, types or strides that the kernel does not take.
    """
    _check(q, k_cache, v_cache, out, k_scale, v_scale, plan)
    num_heads, head_size = q.shape[1], q.shape[2]
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    fp8 = k_cache.dtype.itemsize == 1
    tile = plan.tile
    grouped_attention_kernel[(plan.programs,)](
        out,
        plan.part,
        plan.lse,
        q,
        k_cache,
        v_cache,
        tables,
        seq_lens,
        query_starts,
        plan.items,
        plan.rows,
        plan.first,
        plan.num_items,
        slopes,
        sinks,
        k_scale if fp8 else None,
        v_scale if fp8 else None,
        scale,
        softcap,
        num_kv_heads,
        num_heads,
        tables.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *k_cache.stride(),
        *v_cache.stride(),
        GROUP=group,
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        PAGE=k_cache.shape[1],
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        WINDOW=window,
        USE_SOFTCAP=softcap > 0,
        USE_ALIBI=slopes is not None,
        USE_SINKS=sinks is not None,
        FP8_KV=fp8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge_partials(out, plan.part, plan.lse, plan.rows, plan.first, plan.num_rows)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    plan: DevicePlan,
) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q: {q.dtype} is not one of bfloat16, float16, float32")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"q: {q.shape[1]} heads are no multiple of {k_cache.shape[2]} KV heads"
        )
    if plan.tile.m < q.shape[1] // k_cache.shape[2]:
        raise ValueError(
            f"tile of {plan.tile.m} rows is smaller than a group of "
            f"{q.shape[1] // k_cache.shape[2]} query heads"
        )
    if q.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError("q and out: the elements of a head must be contiguous")
    fp8 = str(k_cache.dtype).startswith("torch.float8")
    if k_cache.dtype != v_cache.dtype or not (fp8 or k_cache.dtype == q.dtype):
        raise ValueError(
            f"k_cache and v_cache: {k_cache.dtype} and {v_cache.dtype} are not both "
            f"{q.dtype} or a float8"
        )
    if fp8 and (k_scale is None or v_scale is None):
        raise ValueError("k_scale and v_scale: a float8 cache needs both")


def grouped_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what ``grouped_attention`` is to compute, in float64, without a plan.

    Request by request, over the keys its own block table names.

    Returns:
        [T, H, D] float64; rows of no request are 0.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    page, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // num_kv_heads
    starts = query_starts.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        blocks = tables[request, : -(-length // page)].long()
        k = k_cache[blocks].flatten(0, 1)[:length].double()
        v = v_cache[blocks].flatten(0, 1)[:length].double()
        if k_scale is not None and v_scale is not None:
            k, v = k * k_scale.double(), v * v_scale.double()
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        score = q[start:end].double().transpose(0, 1) @ k.transpose(1, 2) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        keys = torch.arange(length)
        positions = torch.arange(length - (end - start), length)
        if slopes is not None:
            bias = (keys - (length - (end - start))).double()
            score = score + slopes.double()[:, None, None] * bias
        distance = positions[:, None] - keys[None, :]
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        score = score.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, end - start, 1)
            score = torch.cat([score, sink], 2)
            v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        out[start:end] = (score.softmax(2) @ v).transpose(0, 1)
    return out
