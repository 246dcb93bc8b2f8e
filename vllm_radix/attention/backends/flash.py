"""Grouped attention over vLLM's FlashAttention backend."""

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_radix.attention.backends.base import (
    GroupedBackend,
    GroupedBuilder,
    GroupedImpl,
)


class GroupedFlashBuilder(GroupedBuilder, FlashAttentionMetadataBuilder):
    """Plans for the FlashAttention backend."""

    stock_tile_rows = 64
    stock_splits = True

    @property
    def _num_heads(self) -> int:
        return int(self.num_heads_q)


class GroupedFlashImpl(GroupedImpl, FlashAttentionImpl):
    """Runs plans on FlashAttention's cache."""

    def unsupported(self) -> str | None:
        """Return what our kernels do not compute; float8 needs the Triton backend."""
        if str(self.kv_cache_dtype).startswith("fp8"):
            return (
                "a float8 KV cache under FlashAttention, whose queries are float8 too "
                "(--attention-backend TRITON_ATTN takes it)"
            )
        return super().unsupported()


class GroupedFlashBackend(GroupedBackend, FlashAttentionBackend):
    """``FLASH_ATTN`` with grouped attention."""

    impl_cls = GroupedFlashImpl
    builder_cls = GroupedFlashBuilder
