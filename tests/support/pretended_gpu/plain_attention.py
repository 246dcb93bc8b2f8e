"""vLLM's attention kernel, and the one that fills the cache, in plain torch.

For arms that have many tokens to compute: interpreted, these two of vLLM's kernels
take nine tenths of a step. What they read and write by block tables and slots is the
same. Ours stay interpreted, and so do vLLM's others.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

INSTALL = "support.pretended_gpu.plain_attention:install"
"""For an arm's ``before``, after the pretended GPU's own."""


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *_: Any,
) -> None:
    """Write keys and values to the caches [blocks, page, KV heads, D]."""
    kept = slots >= 0
    where = slots[kept]
    page = key_cache.shape[1]
    for source, cache in ((key, key_cache), (value, value_cache)):
        cache[where // page, where % page] = source[: len(slots)][kept]


def attend(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    block_table: torch.Tensor,
    **features: Any,
) -> None:
    """Write causal attention of each request over its blocks to ``out``.

    Takes what vLLM's kernel takes, and of its features windows only.
    """
    before, after = features["window_size"]
    assert features["causal"] and after == min(before, 0)
    for name in ("alibi_slopes", "sinks", "q_descale", "output_scale"):
        assert features[name] is None, name
    assert not features["softcap"]
    starts, page, group = cu_seqlens_q.tolist(), k.shape[1], q.shape[1] // k.shape[2]
    for row, length in enumerate(seqused_k.tolist()):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        blocks = block_table[row, : -(-length // page)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1)
            for cache in (k, v)
        )
        scores = torch.einsum("thd,shd->hts", q[first:end], keys) * softmax_scale
        at = torch.arange(length - (end - first), length)
        back = at[:, None] - torch.arange(length)
        unread = back < 0 if before < 0 else (back < 0) | (back > before)
        weights = scores.masked_fill(unread, float("-inf")).softmax(-1)
        out[first:end] = torch.einsum("hts,shd->thd", weights, values)


_NAMES = {"unified_attention": attend, "triton_reshape_and_cache_flash": write_cache}
_replaced: dict[str, Any] = {}


def install() -> None:
    """Put both in place of vLLM's."""
    from vllm.v1.attention.backends import triton_attn

    for name, function in _NAMES.items():
        _replaced[name] = getattr(triton_attn, name)
        setattr(triton_attn, name, function)


@contextlib.contextmanager
def vllms_own(_: Any) -> Iterator[None]:
    """Run vLLM's kernels after all, interpreted; for a job's ``within``."""
    from vllm.v1.attention.backends import triton_attn

    with mock.patch.multiple(triton_attn, **_replaced):
        yield
