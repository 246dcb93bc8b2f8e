"""The operations of vLLM's compiled extension that a Llama needs, without it.

Goes into the package ``vllm`` as its module ``_C_stable_libtorch``, which vLLM's CUDA
platform imports before anything else (``overlay.py`` puts it there). Importing it
registers Triton kernels, and a few lines of torch, as ``torch.ops._C``: what a Llama in
16 or 32 bits over the Triton attention backend asks for, and nothing else.

On a CPU, where the CUDA path is only pretended, the plain functions in torch are what
runs; ``PLAIN = False`` runs the kernels there too. They are also what the kernels are
compared with, on a device and in the interpreter.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

PLAIN = True
"""Whether tensors of a CPU are computed in torch, not by the kernels."""

STRONG_REFS = "RADIX_GPU_STRONG_REFS"
"""Environment variable: 1 keeps what a captured graph refers to alive."""


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_stride,
    out_stride,
    size,
    epsilon,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise a row by its root mean square; ``ADD`` takes in a residual first."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        kept = residual_ptr + row * size + at
        x += tl.load(kept, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(out_ptr.dtype.element_ty)
        tl.store(kept, rounded, mask=inside)
        x = rounded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / size + epsilon)
    if WEIGHT:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        y *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + at, y, mask=inside)


@triton.jit
def silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    out_ptr, x_ptr, x_stride, size, BLOCK: tl.constexpr
):
    """Multiply the SiLU of a row's first half by its second half."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + at, mask=inside, other=0.0)
    y = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty) * up
    tl.store(out_ptr + row * size + at, y, mask=inside)


@triton.jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    positions_ptr,
    x_ptr,
    cache_ptr,
    x_stride,
    cache_stride,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NEOX: tl.constexpr,
):
    """Turn the pairs of all heads of a token by its position's angles, in place."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int64)
    pair = tl.arange(0, HALF_PADDED)
    head = tl.arange(0, HEADS_PADDED)
    inside = pair < HALF
    angles = cache_ptr + position * cache_stride + pair
    cos = tl.load(angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angles + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    if NEOX:
        one, two = pair, pair + HALF
    else:
        one, two = 2 * pair, 2 * pair + 1
    base = x_ptr + row * x_stride + head[:, None] * HEAD
    mask = (head < HEADS)[:, None] & inside[None, :]
    a = tl.load(base + one[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + two[None, :], mask=mask, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    tl.store(base + one[None, :], (a * cos - b * sin).to(kind), mask=mask)
    tl.store(base + two[None, :], (b * cos + a * sin).to(kind), mask=mask)


# -- the same in torch ---------------------------------------------------------------


def plain_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    """Return what the norm's kernel computes; a residual takes in ``x`` in place."""
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return y if weight is None else y * weight


def plain_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return what the activation's kernel computes."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).to(x.dtype) * up


def plain_rotary(
    positions: torch.Tensor, x: torch.Tensor, cos_sin: torch.Tensor, neox: bool
) -> torch.Tensor:
    """Return ``x`` [tokens, heads, D] with its pairs turned."""
    cos, sin = cos_sin[positions].float()[:, None].chunk(2, -1)
    wide, half = x.float(), cos.shape[-1]
    if neox:
        a, b = wide[..., :half], wide[..., half : 2 * half]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, wide[..., 2 * half :]], -1).to(x.dtype)


# -- what vLLM calls -----------------------------------------------------------------


def _plain(x: torch.Tensor) -> bool:
    return PLAIN and x.device.type == "cpu"


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return [rows, last] without a copy."""
    rows = x.view(-1, x.shape[-1]) if x.dim() != 2 else x
    assert rows.stride(-1) == 1, "the elements of a row must be neighbours"
    return rows


def _norm(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
) -> None:
    if _plain(x):
        out.copy_(plain_norm(x, residual, weight, epsilon))
        return
    size, x_rows, out_rows = x.shape[-1], _rows(x), _rows(out)
    if not x_rows.shape[0]:
        return
    assert residual is None or residual.is_contiguous()
    block = _power(size)
    rms_norm_kernel[(x_rows.shape[0],)](
        out_rows,
        x_rows,
        x_rows if residual is None else residual,
        x_rows if weight is None else weight,
        x_rows.stride(0),
        out_rows.stride(0),
        size,
        epsilon,
        ADD=residual is not None,
        WEIGHT=weight is not None,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


def rms_norm(
    result: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
) -> None:
    """Write the norm of each row to ``result``."""
    _norm(result, input, None, weight, epsilon)


def fused_add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
) -> None:
    """Add ``input`` to ``residual``, and write the sum's norm to ``input``."""
    _norm(input, input, residual, weight, epsilon)


def silu_and_mul(result: torch.Tensor, input: torch.Tensor) -> None:
    """Write the gated activation of each row to ``result``."""
    if _plain(input):
        result.copy_(plain_silu_and_mul(input))
        return
    rows, size = _rows(input), input.shape[-1] // 2
    if not rows.shape[0]:
        return
    assert result.is_contiguous()
    silu_and_mul_kernel[(rows.shape[0], triton.cdiv(size, 1024))](
        result, rows, rows.stride(0), size, BLOCK=1024
    )


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Turn queries and keys by their positions, in place."""
    assert positions.dim() == 1 and not rope_dim_offset and not inverse
    half = cos_sin_cache.shape[-1] // 2
    for x in (query, key):
        if x is None or not positions.numel():
            continue
        rows = x if x.dim() == 2 else x.view(x.shape[0], -1)
        heads = rows.shape[1] // head_size
        if _plain(x):
            by_head = rows.view(len(rows), heads, head_size)
            by_head.copy_(plain_rotary(positions, by_head, cos_sin_cache, is_neox))
            continue
        assert rows.stride(-1) == 1
        rotary_kernel[(rows.shape[0],)](
            positions,
            rows,
            cos_sin_cache,
            rows.stride(0),
            cos_sin_cache.stride(0),
            HEAD=head_size,
            HALF=half,
            HALF_PADDED=_power(half),
            HEADS=heads,
            HEADS_PADDED=_power(heads),
            NEOX=is_neox,
            num_warps=4,
        )


_CODES = {
    torch.bool: "|b1",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.uint32: "<u4",
    torch.uint64: "<u8",
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
}


class _Memory:
    """Memory that torch takes for a CUDA array; ``owner`` lives as long."""

    def __init__(self, tensor: torch.Tensor, code: str, owner: object) -> None:
        self.owner = owner
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": code,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def as_cuda(tensor: torch.Tensor, owner: object) -> torch.Tensor:
    """Return a tensor of the device over the same memory; ``owner`` is kept alive.

    Raises:
        RuntimeError: torch made a copy.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    # bfloat16 and float8 have no code: their bits travel.
    code = _CODES.get(tensor.dtype) or {1: "|u1", 2: "<i2"}[tensor.element_size()]
    out = torch.as_tensor(_Memory(tensor, code, owner), device=device)
    if out.data_ptr() != tensor.data_ptr():
        raise RuntimeError("torch made a copy of memory that the device was to see")
    return out if out.dtype == tensor.dtype else out.view(tensor.dtype)


def get_cuda_view_from_cpu_tensor(cpu_tensor: torch.Tensor) -> torch.Tensor:
    """Return the device's view of pinned memory."""
    if not cpu_tensor.numel():
        return torch.empty(cpu_tensor.shape, dtype=cpu_tensor.dtype, device="cuda")
    if not cpu_tensor.is_pinned():
        cpu_tensor = cpu_tensor.pin_memory()
    return as_cuda(cpu_tensor, cpu_tensor)


def weak_ref_tensor(input: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that does not keep it."""
    if os.environ.get(STRONG_REFS) == "1":
        return input.view_as(input)
    return as_cuda(input, None)


_IN_PLACE: dict[str, Callable[..., Any]] = {
    "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()": (
        rms_norm
    ),
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, "
    "float epsilon) -> ()": fused_add_rms_norm,
    "silu_and_mul(Tensor! result, Tensor input) -> ()": silu_and_mul,
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) "
    "-> ()": rotary_embedding,
}
_VIEWS: dict[str, Callable[..., Any]] = {
    "get_cuda_view_from_cpu_tensor(Tensor cpu_tensor) -> Tensor": (
        get_cuda_view_from_cpu_tensor
    ),
    "weak_ref_tensor(Tensor input) -> Tensor": weak_ref_tensor,
}
# Asked at import: what the compiled kernels for quantised models could do. Nothing.
_SUPPORT = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


def register() -> torch.library.Library:
    """Return the library that registers the operations; they go when it goes."""
    library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in {**_IN_PLACE, **_VIEWS}.items():
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, function, "CUDA")
        library.impl(name, function, "CPU")
        if schema in _IN_PLACE:
            torch.library.register_fake(
                f"_C::{name}", lambda *_, **__: None, lib=library
            )
    for name in _SUPPORT:
        library.define(f"{name}(int cuda_device_capability) -> bool")
        library.impl(name, lambda _: False, "CompositeExplicitAutograd")
    return library


# As vLLM's module only: elsewhere the functions are called by themselves, and vLLM's
# own extension may have registered the operations.
if __name__ == "vllm._C_stable_libtorch":
    _library = register()
    # What vLLM asks of a torch newer than the device's may be.
    if not hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = lambda: None
