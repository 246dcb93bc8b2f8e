"""Routing that looks at nothing."""

from collections.abc import Sequence
from typing import ClassVar

from vllm_radix_bench.routing.base import EngineLoad, Routing


class RoundRobin(Routing):
    """One engine after the other, whatever is sent."""

    name: ClassVar = "round-robin"
    like: ClassVar = "any load balancer; `--policy round_robin` of vllm-router"

    def choose(
        self, prompt: Sequence[int], salt: str | None, loads: Sequence[EngineLoad]
    ) -> int:
        """Return the next engine: O(engines)."""
        return self.least(lambda engine: 0)
