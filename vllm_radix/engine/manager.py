"""The KV cache manager: vLLM's own, finding prefixes by tokens, not by hash."""

from typing import Any

from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.compat import KVCacheBlocks, KVCacheManager, Request
from vllm_radix.tree import LRU, EvictionPolicy


class RadixKVCacheManager(KVCacheManager):
    """A ``KVCacheManager`` over a radix tree, for one full-attention group.

    Takes vLLM's arguments. ``adopt`` turns an existing manager into one: the
    scheduler's constructor builds it and binds connectors to that object.
    """

    block_pool: RadixBlockPool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        RadixBlockPool.adopt(self.block_pool, LRU())

    @classmethod
    def adopt(
        cls, manager: KVCacheManager, policy: EvictionPolicy
    ) -> "RadixKVCacheManager":
        """Turn an unused manager, and its pool, into radix ones, in place."""
        RadixBlockPool.adopt(manager.block_pool, policy)
        manager.__class__ = cls
        return manager

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Return the longest cached prefix of a request.

        Returns:
            As vLLM's: the blocks, the tokens they hold, and 0 (no sparse group
            lags behind).
        """
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        size = self.block_pool.hash_block_size
        # At least one token is computed, for its logits.
        blocks = self.block_pool.match(request, (request.num_tokens - 1) // size)
        if blocks and 0 in self.coordinator.eagle_group_ids:
            # EAGLE computes the last block again, for its hidden states.
            blocks.pop()
        if (
            blocks
            and self.enable_kv_cache_events
            and getattr(request, "kv_cache_report_mode", "incremental") == "full"
        ):
            self.coordinator.emit_cached_block_events(request, (blocks,))
        return self.create_kv_cache_blocks((blocks,)), len(blocks) * size, 0
