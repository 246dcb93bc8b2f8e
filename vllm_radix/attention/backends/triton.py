"""Grouped attention over vLLM's Triton backend."""

from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_radix.attention.backends.base import (
    GroupedBackend,
    GroupedBuilder,
    GroupedImpl,
)


class GroupedTritonBuilder(GroupedBuilder, TritonAttentionMetadataBuilder):
    """Plans for the Triton backend."""

    @property
    def _num_heads(self) -> int:
        return int(self.num_heads_q)


class GroupedTritonImpl(GroupedImpl, TritonAttentionImpl):
    """Runs plans on the Triton backend's cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Our kernels take float8 keys, not float8 queries; vLLM's take both.
        self.supports_quant_query_input = False

    def caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values; as float8 where the cache is."""
        keys, values = super().caches(kv_cache)
        if str(self.kv_cache_dtype).startswith("fp8") and keys.dtype != self.fp8_dtype:
            keys, values = keys.view(self.fp8_dtype), values.view(self.fp8_dtype)
        return keys, values


class GroupedTritonBackend(GroupedBackend, TritonAttentionBackend):
    """``TRITON_ATTN`` with grouped attention."""

    impl_cls = GroupedTritonImpl
    builder_cls = GroupedTritonBuilder
