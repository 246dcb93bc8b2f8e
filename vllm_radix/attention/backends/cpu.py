"""Grouped attention over vLLM's CPU backend: the interpreted kernels, for tests."""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_radix.attention.backends.base import (
    GroupedBackend,
    GroupedBuilder,
    GroupedImpl,
)
from vllm_radix.attention.planner import Limits
from vllm_radix.config import not_grouped
from vllm_radix_kernels.grouped_attention import grouped_attention
from vllm_radix_kernels.interpreter import interpreted
from vllm_radix_kernels.tiles import Tile


class GroupedCPUBuilder(GroupedBuilder, CPUAttentionMetadataBuilder):
    """Plans for the CPU backend."""

    @property
    def _num_heads(self) -> int:
        return int(self.num_heads)

    def _limits(self, kv_cache_spec: Any, vllm_config: Any) -> tuple[Limits, Tile]:
        if self.isa == "amx":
            raise ValueError(not_grouped("the CPU backend's cache layout for AMX"))
        return super()._limits(kv_cache_spec, vllm_config)


class GroupedCPUImpl(GroupedImpl, CPUAttentionBackendImpl):
    """Runs plans in Triton's interpreter."""

    def unsupported(self) -> str | None:
        """Return what our kernels do not compute; float8 is laid out otherwise."""
        if self.is_fp8_kv_cache:
            return "a float8 KV cache on a CPU"
        return super().unsupported()

    def caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the CPU layout: keys of a block are stored transposed."""
        blocks, heads, page, _ = kv_cache.shape
        size = self.head_size
        halves = kv_cache.view(blocks, heads, 2, page * size)
        keys = halves[:, :, 0].unflatten(2, (size, page)).permute(0, 3, 1, 2)
        values = halves[:, :, 1].unflatten(2, (page, size)).permute(0, 2, 1, 3)
        return keys, values

    @staticmethod
    def attend(*args: Any, **kwargs: Any) -> None:
        """Run our kernels interpreted."""
        with interpreted():
            grouped_attention(*args, **kwargs)


class GroupedCPUBackend(GroupedBackend, CPUAttentionBackend):
    """``CPU_ATTN`` with grouped attention."""

    impl_cls = GroupedCPUImpl
    builder_cls = GroupedCPUBuilder
