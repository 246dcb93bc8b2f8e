"""Join partial attention results by the log-sum-exp of their scores."""

import torch
import triton
import triton.language as tl


@triton.jit
def merge_partials_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    part_ptr,
    lse_ptr,
    rows_ptr,
    first_ptr,
    num_heads,
    out_stride_t,
    out_stride_h,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Join the partials of one row, ``BLOCK_H`` heads at a time."""
    row = tl.program_id(0)
    first = tl.load(first_ptr + row).to(tl.int64)
    end = tl.load(first_ptr + row + 1).to(tl.int64)
    if end - first > 1:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        offs_d = tl.arange(0, HEAD_PADDED)
        in_heads = head < num_heads
        mask = in_heads[:, None] & (offs_d < HEAD)[None, :]
        highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total_weight = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, HEAD_PADDED], tl.float32)
        for number in range(0, end - first):
            part = (first + number) * num_heads + head
            lse = tl.load(lse_ptr + part, mask=in_heads, other=float("-inf"))
            value = tl.load(
                part_ptr + part[:, None] * HEAD + offs_d[None, :], mask=mask, other=0.0
            )
            new_highest = tl.maximum(highest, lse)
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            shrink = tl.exp2(highest - base)
            weight = tl.exp2(lse - base)
            total_weight = total_weight * shrink + weight
            acc = acc * shrink[:, None] + value * weight[:, None]
            highest = new_highest
        safe_weight = tl.where(total_weight == 0.0, 1.0, total_weight)
        token = tl.load(rows_ptr + row * 2).to(tl.int64)
        tl.store(
            out_ptr
            + (token * out_stride_t + head * out_stride_h)[:, None]
            + offs_d[None, :],
            (acc / safe_weight[:, None]).to(out_ptr.dtype.element_ty),
            mask=mask,
        )


def merge_partials(
    out: torch.Tensor,
    part: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    first: torch.Tensor,
    num_rows: int,
) -> None:
    """Write each row's joined partials to ``out``; O(partials x H x D).

    Rows with fewer than two partials are left alone: theirs is in ``out`` already, or
    they are padding.

    Args:
        out: [T, H, D], written; D contiguous.
        part: [P, H, D] float32 partial results.
        lse: [P, H] float32, base 2; -inf for a partial that saw no key.
        rows: [N, 2] int32, the token of each row first.
        first: [N + 1] int32, first partial of each row.
        num_rows: rows to join.
    """
    num_heads, head_size = part.shape[1], part.shape[2]
    # Few heads of many rows are enough parallelism, and registers are short.
    block_h = min(triton.next_power_of_2(num_heads), 8)
    merge_partials_kernel[(num_rows, triton.cdiv(num_heads, block_h))](
        out,
        part,
        lse,
        rows,
        first,
        num_heads,
        out.stride(0),
        out.stride(1),
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_H=block_h,
    )


def merge_partials_reference(
    part: torch.Tensor, lse: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Return the joined partials of each row, [N, H, D] float64; 0 for no partial."""
    joined = []
    for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
        weight = torch.softmax(lse[begin:end].double() * 0.6931471805599453, 0)
        joined.append((weight[:, :, None] * part[begin:end].double()).sum(0))
    return torch.stack(joined)
