"""vLLM's unified Triton attention kernel, also where there is no GPU.

On a GPU this is an import. On a CPU vLLM defines its kernels with placeholders for
Triton; here the kernel's modules are executed once more with the real Triton, so that
``vllm_radix_kernels.interpreter.interpreted`` can run it. vLLM itself keeps the
modules it has.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from vllm_radix.attention.planner import STOCK_PROGRAMS, STOCK_SEGMENTS

OPS = "vllm.v1.attention.ops"
MODULES = ("triton_attention_helpers", "triton_unified_attention")
"""Modules of the kernel, callees first."""

LEAST_PROGRAMS, SEGMENTS = STOCK_PROGRAMS, STOCK_SEGMENTS
"""vLLM's ``MIN_LAUNCH_GRID_SIZE_2D`` and ``NUM_PAR_SOFTMAX_SEGMENTS``; the module that
has them takes ten seconds to import. A test compares."""


@functools.cache
def unified_attention() -> Callable[..., None]:
    """Return ``unified_attention`` of vLLM, made of real Triton kernels.

    Without a GPU it runs inside ``interpreted()`` only.
    """
    kernel = importlib.import_module(f"{OPS}.{MODULES[-1]}")
    utils: Any = importlib.import_module("vllm.triton_utils")
    if utils.HAS_TRITON:
        return kernel.unified_attention  # type: ignore[no-any-return]
    import triton
    import triton.language as tl

    # All that they import is loaded by now, with its placeholders: only these see
    # the real Triton.
    package = importlib.import_module(OPS)
    placeholders = utils.triton, utils.tl
    theirs = {name: sys.modules.pop(f"{OPS}.{name}") for name in MODULES}
    utils.triton, utils.tl = triton, tl
    try:
        for name in MODULES:
            kernel = importlib.import_module(f"{OPS}.{name}")
    finally:
        utils.triton, utils.tl = placeholders
        for name, module in theirs.items():
            sys.modules[f"{OPS}.{name}"] = module
            setattr(package, name, module)
    return kernel.unified_attention  # type: ignore[no-any-return]


def segment_buffers(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_requests: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return what vLLM's Triton backend gives the kernel for its 3D variant.

    With it the kernel splits keys in parallel segments where a batch decodes and its
    requests are too few to fill the device; ``splits`` tells which.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_size: elements of each.
        num_requests: of the batch.
        device: where the kernel runs.

    Returns:
        Keyword arguments of ``unified_attention``: a threshold, a number of segments,
        and float32 buffers [threshold, H, segments, padded D] and twice
        [threshold, H, segments].
    """
    threshold = LEAST_PROGRAMS // num_kv_heads
    segments = SEGMENTS
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (12, 0):
        # As there: more of them where those would not fill the processors.
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        if num_requests <= (processors - 1) // (SEGMENTS * num_kv_heads):
            segments = 4 * SEGMENTS
    padded = 1 << (head_size - 1).bit_length()

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": segments,
        "softmax_segm_output": floats(threshold, num_heads, segments, padded),
        "softmax_segm_max": floats(threshold, num_heads, segments),
        "softmax_segm_expsum": floats(threshold, num_heads, segments),
    }


def splits(num_requests: int, new_tokens: int, num_kv_heads: int) -> bool:
    """Whether vLLM's backend takes the 3D variant; ``new_tokens`` of the longest."""
    return new_tokens == 1 and num_requests <= LEAST_PROGRAMS // num_kv_heads


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_starts: torch.Tensor,
    new_tokens: int,
    longest: int,
    buffers: dict[str, Any],
) -> None:
    """Write causal attention over a paged cache to ``out``, as vLLM's backend does.

    Args:
        q: [T, H, D].
        k_cache: [blocks, page, KV heads, D], any strides; q's type.
        v_cache: the same.
        out: [T, H, D].
        tables: [R, W] int32, blocks of each request.
        seq_lens: [R] int32, tokens of each request, with this step's.
        query_starts: [R + 1] int32, first row of each request in ``q``.
        new_tokens: rows of the request with the most.
        longest: tokens of the longest request.
        buffers: of ``segment_buffers``.
    """
    unified_attention()(
        q=q,
        k=k_cache,
        v=v_cache,
        out=out,
        cu_seqlens_q=query_starts,
        max_seqlen_q=new_tokens,
        seqused_k=seq_lens,
        max_seqlen_k=longest,
        softmax_scale=q.shape[2] ** -0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=tables,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        **buffers,
    )
