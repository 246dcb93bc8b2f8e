"""Mamba and gated delta nets: one state, which each step overwrites.

vLLM keeps a request's running state in the block of its last token, and goes on to
the next block when that is full. The state at the end of a block stays behind; one
inside a block is gone with the next step, unless it is copied first. vLLM has such a
copy, for the ends of prompts; here it is asked for at any resume point::

    step t       computes up to token n, inside block 2; its state lies in block 2
    step t + 1   copies block 2 to a block of its own, then goes on in block 2
    step t + 2   others can go on at n, from the copy
"""

from typing import Any

from vllm_radix.engine.compat import (
    KVCacheBlock,
    MambaAttentionBackendEnum,
    MambaManager,
    get_mamba_prefill_checkpoint_position,
)
from vllm_radix.engine.groups.base import GroupType
from vllm_radix.tree.resume import State

_GRAINS = {
    # Their kernels compute in chunks of 64 tokens: cut elsewhere, bfloat16 rounds
    # otherwise than in one go.
    MambaAttentionBackendEnum.GDN_ATTN: 64,
    MambaAttentionBackendEnum.LINEAR: 64,
}


class MambaGroup(GroupType):
    """Layers with a state."""

    manager = MambaManager

    @classmethod
    def component(cls, manager: Any) -> State:
        """Return the state, and after which tokens it may be cut."""
        grain = _GRAINS.get(manager.kv_cache_spec.mamba_type, 1)
        return State(manager.block_size, grain=grain)

    @classmethod
    def problem(cls, spec: Any) -> str | None:
        """Return why states cannot be cached, or None."""
        if spec.mamba_cache_mode != "align":
            return "states that are not cached (--mamba-cache-mode is not align)"
        if spec.mamba_type == MambaAttentionBackendEnum.SHORT_CONV:
            return "short convolutions, whose outputs depend on where prompts are cut"
        return None


def unit_of(coordinator: Any) -> int:
    """Return the tokens between places where stock finds states inside blocks.

    0 where it finds none there, without ``--prefix-match-unit``.
    """
    unit: int = coordinator.block_pool.hash_block_size
    return unit if coordinator.enable_partial_hash_hits else 0


def last_unit(manager: Any, num_tokens: int, unit: int) -> int:
    """Return where stock keeps a state near the end of a prompt, by its units.

    Args:
        manager: of a group.
        num_tokens: of the prompt.
        unit: see ``unit_of``.
    """
    drop: bool = manager.drop_eagle_checkpoint_block
    return get_mamba_prefill_checkpoint_position(num_tokens, unit, drop)


def keep_state(manager: Any, request_id: str, num_tokens: int) -> KVCacheBlock | None:
    """Have the next step copy a request's state before it is overwritten.

    Args:
        manager: of the group.
        request_id: of a request whose step ends inside a block.
        num_tokens: after which the state is.

    Returns:
        The block that holds it; None if the request has none there.
    """
    blocks = manager.req_to_blocks[request_id]
    index = (num_tokens - 1) // manager.block_size
    if index >= len(blocks) or blocks[index].is_null:
        return None
    block: KVCacheBlock = blocks[index]
    manager._partial_hit_reqs[request_id] = index, block
    cached = manager.num_cached_block.get(request_id, 0)
    manager.num_cached_block[request_id] = min(cached, index)
    return block
