"""Eviction policies: one module each, imported here to be registered."""

from vllm_radix.tree.eviction.arc import ARC
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
from vllm_radix.tree.eviction.s3_fifo import S3FIFO
from vllm_radix.tree.eviction.slru import SegmentedLRU

__all__ = [
    "ARC",
    "LRU",
    "MAX_CLASSES",
    "NEVER",
    "POLICIES",
    "RANK_LIMIT",
    "S3FIFO",
    "EvictionPolicy",
    "HitDensity",
    "Queues",
    "SegmentedLRU",
    "register",
]
