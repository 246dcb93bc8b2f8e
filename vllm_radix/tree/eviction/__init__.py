"""Eviction policies: one module each, imported here to be registered."""

from vllm_radix.tree.eviction.base import (
    POLICIES,
    RANK_LIMIT,
    EvictionPolicy,
    register,
)
from vllm_radix.tree.eviction.lru import LRU

__all__ = ["LRU", "POLICIES", "RANK_LIMIT", "EvictionPolicy", "register"]
