"""Types of KV cache groups, one module each.

``GROUP_TYPES`` lists them by vLLM's manager; docs/extending.md has the recipe for one
more.
"""

from vllm_radix.engine.groups.base import GroupType
from vllm_radix.engine.groups.chunked_local import ChunkedLocalGroup
from vllm_radix.engine.groups.full_attention import FullAttentionGroup
from vllm_radix.engine.groups.mamba import MambaGroup
from vllm_radix.engine.groups.sliding_window import SlidingWindowGroup

GROUP_TYPES: dict[type, type[GroupType]] = {
    group.manager: group
    for group in (
        FullAttentionGroup,
        SlidingWindowGroup,
        ChunkedLocalGroup,
        MambaGroup,
    )
}

__all__ = ["GROUP_TYPES", "GroupType"]
