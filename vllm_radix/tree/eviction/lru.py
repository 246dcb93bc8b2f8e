"""Least recently used."""

from vllm_radix.tree.eviction.base import EvictionPolicy, register


@register
class LRU(EvictionPolicy):
    """Evicts the block that has been idle for longest.

    All blocks are of one class. Requests release their blocks from the tail, so that of
    one request's blocks the deepest goes first; vLLM's free list keeps the same order.
    """

    name = "lru"
