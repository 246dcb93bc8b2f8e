"""Routing by queues, as vLLM does it between its data-parallel engines."""

from collections.abc import Sequence
from typing import ClassVar

from vllm_radix_bench.routing.base import EngineLoad, Routing, RoutingOption

_FULL_FROM = 0.5
"""Share of a cache in use from which waiting requests weigh more."""
_WEIGHT = 6.0
"""Of the share above it: a waiting request counts 4 times at a full cache."""


class LeastQueue(Routing):
    """The engine with the fewest requests, as vLLM's own balancer counts them.

    It is `DPLBAsyncMPClient.get_core_engine_for_request` of vLLM 0.32 with one API
    server: the score is the larger of the requests in flight and of those that waited
    and ran when engines last told; those that waited weigh more where the cache is more
    than half in use. Engines' counts come every so many milliseconds, and in between
    each choice counts as one more that waits.
    """

    name: ClassVar = "least-queue"
    like: ClassVar = "vLLM's own balancer (`--data-parallel-size`)"
    options: ClassVar = {
        "interval_ms": RoutingOption(100, 1, 60_000, "between counts of the engines")
    }

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        super().__init__(num_engines, options)
        self.observe_every = options["interval_ms"] / 1000
        self._told = [EngineLoad() for _ in range(num_engines)]

    def observe(self, loads: Sequence[EngineLoad]) -> None:
        """Take what engines told: O(engines)."""
        self._told = [
            EngineLoad(0, load.waiting, load.running, load.kv_usage) for load in loads
        ]

    def choose(
        self, prompt: Sequence[int], salt: str | None, loads: Sequence[EngineLoad]
    ) -> int:
        """Return the engine with the least score: O(engines)."""

        def score(engine: int) -> float:
            told = self._told[engine]
            count = max(loads[engine].in_flight, told.waiting + told.running)
            over = max(0.0, told.kv_usage - _FULL_FROM)
            return count + told.waiting * _WEIGHT * over

        chosen = self.least(score)
        self._told[chosen].waiting += 1
        return chosen
