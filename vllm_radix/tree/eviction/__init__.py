"""Eviction policies: one module each, imported here to be registered."""

from vllm_radix.tree.eviction.base import (
    MAX_CLASSES,
    NEVER,
    POLICIES,
    RANK_LIMIT,
    EvictionPolicy,
    Queues,
    register,
)
from vllm_radix.tree.eviction.hit_density import HitDensity
from vllm_radix.tree.eviction.lru import LRU

__all__ = [
    "LRU",
    "MAX_CLASSES",
    "NEVER",
    "POLICIES",
    "RANK_LIMIT",
    "EvictionPolicy",
    "HitDensity",
    "Queues",
    "register",
]
