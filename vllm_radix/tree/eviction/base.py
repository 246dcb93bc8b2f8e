"""What an eviction policy is, and the registry of all of them.

A policy only ranks. Which blocks may go at all (idle, nothing cached below them) is
the cache's knowledge: it asks for a rank once, when a block becomes idle, and evicts
the evictable block of the lowest rank.
"""

from abc import ABC, abstractmethod
from typing import TypeVar

RANK_LIMIT = 1 << 61
"""Ranks are at least 0 and below this; the cache keeps what is above for pins."""


class EvictionPolicy(ABC):
    """Ranks a block at the moment it becomes idle; the lowest rank goes first.

    Attributes:
        name: what the option ``eviction`` calls the policy.
    """

    name: str

    @abstractmethod
    def rank(self, clock: int, depth: int) -> int:
        """Return the rank of a block, in ``range(RANK_LIMIT)``. O(1).

        Args:
            clock: number of releases before this one; strictly increasing.
            depth: number of blocks between the root and this block.
        """


POLICIES: dict[str, type[EvictionPolicy]] = {}
"""The policies by name: the values of the option ``eviction``."""

_Policy = TypeVar("_Policy", bound=type[EvictionPolicy])


def register(policy: _Policy) -> _Policy:
    """Add a policy to ``POLICIES``, and return it: a class decorator.

    Raises:
        ValueError: its name is empty, or taken.
    """
    name = getattr(policy, "name", "")
    if not name:
        raise ValueError(f"{policy.__name__} needs a name to be chosen by")
    if name in POLICIES:
        raise ValueError(f"two eviction policies are called {name!r}")
    POLICIES[name] = policy
    return policy
