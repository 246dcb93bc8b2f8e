"""Fairness between tenants: deficit counters, as in DLPM.

Each tenant may compute a quantum of tokens per round; whoever has used up its own
stands back until nobody else waits who has some left (Cao et al., "Locality-aware
fair scheduling in LLM serving", 2025). Within that, the order is free.
"""

from collections.abc import Iterable

_MOST = 10_000
"""Tenants remembered; beyond, the one served longest ago is forgiven."""


class DeficitCounters:
    """What each tenant may still compute in this round.

    Args:
        quantum: tokens that a tenant may compute in a round.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._left: dict[str, float] = {}

    def over_quota(self, tenants: Iterable[str]) -> set[str]:
        """Return the tenants that stand back now; starts a new round when all would.

        Args:
            tenants: of all who wait.
        """
        waiting = set(tenants)
        if not waiting:
            return waiting
        left = {tenant: self._left.get(tenant, self._quantum) for tenant in waiting}
        most = max(left.values())
        if most <= 0:
            # As many rounds as it takes until somebody has some left.
            refill = (-most // self._quantum + 1) * self._quantum
            for tenant in list(self._left):
                self._left[tenant] += refill
                if self._left[tenant] >= self._quantum:
                    del self._left[tenant]
            left = {t: self._left.get(t, self._quantum) for t in waiting}
        return {tenant for tenant in waiting if left[tenant] <= 0}

    def charge(self, tenant: str, tokens: int) -> None:
        """Note tokens computed for a tenant, O(1)."""
        if tokens:
            # Whoever was served last is forgotten last.
            left = self._left.pop(tenant, self._quantum)
            self._left[tenant] = left - tokens
            if len(self._left) > _MOST:
                del self._left[next(iter(self._left))]
