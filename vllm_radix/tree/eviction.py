"""Eviction policies: which evictable block goes first.

A policy only ranks. Which blocks may go at all (idle, nothing cached below
them) is the cache's knowledge; the cache asks for a rank once, when a block
becomes idle, and evicts the evictable block of the lowest rank.
"""

from abc import ABC, abstractmethod


class EvictionPolicy(ABC):
    """Ranks a block at the moment it becomes idle; the lowest rank goes first."""

    name: str

    @abstractmethod
    def rank(self, clock: int, depth: int) -> int:
        """Return the rank of a block, O(1).

        Args:
            clock: number of releases before this one; strictly increasing.
            depth: number of blocks between the root and this block.
        """


class LRU(EvictionPolicy):
    """Least recently used: the block idle for longest goes first.

    Requests release their blocks from the tail, so that of one request's
    blocks the deepest goes first; vLLM's free list keeps the same order.
    """

    name = "lru"

    def rank(self, clock: int, depth: int) -> int:
        """Return the time of release."""
        return clock


POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (LRU,)}
