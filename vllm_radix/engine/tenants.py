"""The tenants of waiting requests, and which of them stand back in a step."""

from collections import Counter
from collections.abc import Iterable, Mapping

from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import Request
from vllm_radix.policy import DeficitCounters, WaitingRequest


class Tenants:
    """Tells requests of tenants apart, and keeps the tenants to their shares.

    Does nothing unless the option ``tenant`` names what tells them apart.

    Args:
        config: the options.
    """

    def __init__(self, config: RadixConfig) -> None:
        self._field = config.tenant
        self._deficits = DeficitCounters(config.fair_quantum) if config.tenant else None
        self._num_waiting: Counter[str] = Counter()

    def name_of(self, request: Request) -> str:
        """Return the tenant of a request; empty if tenants are not told apart."""
        if not self._field:
            return ""
        return self.of(request, self._field)

    @staticmethod
    def of(request: Request, field: str) -> str:
        """Return what a request has in a field: ``cache_salt`` or of ``vllm_xargs``."""
        if field == "cache_salt":
            return request.cache_salt or ""
        params = request.sampling_params or request.pooling_params
        extra = getattr(params, "extra_args", None) or {}
        return str(extra.get(field, ""))

    def note_waiting(self, tenant: str) -> None:
        """Note a request that came, O(1)."""
        if self._deficits is not None:
            self._num_waiting[tenant] += 1

    def note_gone(self, tenant: str) -> None:
        """Note a request that waits no more, O(1)."""
        if self._deficits is not None:
            self._num_waiting[tenant] -= 1
            if not self._num_waiting[tenant]:
                del self._num_waiting[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for tokens that were computed for it."""
        if self._deficits is not None:
            self._deficits.charge(tenant, tokens)

    def over_quota(
        self, waiting: Mapping[str, WaitingRequest], blocked: set[str]
    ) -> set[str]:
        """Return the tenants that stand back in this step.

        O(tenants), and O(requests) if some are blocked.

        Args:
            waiting: the waiting requests, by id.
            blocked: ids of those that this step cannot admit.
        """
        if self._deficits is None or len(self._num_waiting) < 2:
            return set()
        tenants: Iterable[str] = self._num_waiting
        if blocked:
            tenants = {e.tenant for e in waiting.values() if e.id not in blocked}
        return self._deficits.over_quota(tenants)
