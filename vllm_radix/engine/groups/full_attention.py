"""vLLM's manager of a full-attention group, taking over partial blocks.

A hit that ends inside a block is vLLM's own copy-on-write: the shared block is
copied at the start of the step and the request writes into its copy. Where
nobody else uses the block and the request continues all that it holds, the copy
would leave a block behind that is worth nothing: the request takes it instead.
"""

from collections.abc import Sequence
from typing import Any

from vllm_radix.engine.compat import (
    FullAttentionManager,
    KVCacheBlock,
    MLAAttentionSpec,
)
from vllm_radix.engine.groups.base import GroupType
from vllm_radix.tree.resume import Dense


class FullAttentionGroup(GroupType):
    """Layers that read all tokens, beside groups of other types.

    A group of its own is served by ``RadixFullAttentionManager``.
    """

    manager = FullAttentionManager

    @classmethod
    def component(cls, manager: Any) -> Dense:
        """Return the component that needs all blocks."""
        return Dense(manager.block_size)

    @classmethod
    def problem(cls, spec: Any) -> str | None:
        """Return why a group beside others cannot be served, or None."""
        kinds = [spec, *getattr(spec, "kv_cache_specs", {}).values()]
        if any(isinstance(kind, MLAAttentionSpec) for kind in kinds):
            return "MLA (multi-head latent attention) beside layers of other kinds"
        return None


class RadixFullAttentionManager(FullAttentionManager):
    """A ``FullAttentionManager`` that may take over the last block of a hit.

    Attributes:
        taken: the block that the request looked up last is to take over.
    """

    taken: KVCacheBlock | None = None

    @classmethod
    def adopt(cls, manager: FullAttentionManager) -> "RadixFullAttentionManager":
        """Turn vLLM's manager into this one, in place."""
        assert type(manager) is FullAttentionManager, type(manager)
        manager.__class__ = cls
        return manager

    def _has_partial_local_hit(
        self, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> bool:
        if not super()._has_partial_local_hit(new_computed_blocks, *args, **kwargs):
            return False
        return new_computed_blocks[-1] is not self.taken

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add the blocks of a hit; one that is taken over is not yet full."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, *args, **kwargs
        )
        if new_computed_blocks and new_computed_blocks[-1] is self.taken:
            self.num_cached_block[request_id] -= 1
            self.taken = None
