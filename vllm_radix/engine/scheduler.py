"""The scheduler: vLLM's own, with the waiting queue put in order first.

Before vLLM's ``schedule()`` runs, unchanged, the waiting requests are ordered
by what of them is cached. vLLM then admits from the front, as always.
"""

from typing import Any

import vllm_radix
from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import (
    AsyncScheduler,
    FCFSRequestQueue,
    KVCacheConfig,
    PauseState,
    Request,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    SchedulingPolicy,
    VllmConfig,
    logger,
)
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.engine.support import config_problem, layout_problem, version_problem
from vllm_radix.policy import Waiting, needs_order, prefix_order
from vllm_radix.tree import POLICIES, Probe


class RadixScheduler(Scheduler):
    """vLLM's scheduler over a radix tree; pass it as ``scheduler_cls``.

    Called with vLLM's arguments. Returns the asynchronous variant when the
    configuration asks for asynchronous scheduling, and a stock scheduler when
    the model is not supported and ``on_unsupported`` is ``stock``.

    Raises:
        ValueError: an option is wrong, or the model or a setting is not
            supported; the message is one sentence that names the fix.
    """

    kv_cache_manager: RadixKVCacheManager

    def __new__(
        cls,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Choose the class that fits the configuration."""
        config = RadixConfig.from_additional_config(vllm_config.additional_config)
        asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
        problem = (
            version_problem()
            or config_problem(vllm_config)
            or layout_problem(kv_cache_config)
        )
        if problem is None:
            if asynchronous and not issubclass(cls, AsyncScheduler):
                cls = AsyncRadixScheduler
            return super().__new__(cls)
        if config.on_unsupported == "error":
            raise ValueError(problem)
        logger.warning("Serving with stock vLLM, as asked: %s", problem)
        stock = AsyncScheduler if asynchronous else Scheduler
        return stock(vllm_config, kv_cache_config, *args, **kwargs)

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.radix_config = RadixConfig.from_additional_config(
            vllm_config.additional_config
        )
        eviction = POLICIES[self.radix_config.eviction]()
        RadixKVCacheManager.adopt(self.kv_cache_manager, eviction)
        self._waiting_entries: dict[str, Waiting] = {}
        self._probes: dict[str, Probe | None] = {}
        self._arrivals = 0
        # A priority queue's order is a promise to the user: left alone.
        self._may_order = (
            self.radix_config.policy == "prefix"
            and self.policy == SchedulingPolicy.FCFS
            and isinstance(self.waiting, FCFSRequestQueue)
        )
        self._announce()

    def _announce(self) -> None:
        left_to_stock = []
        if self.policy != SchedulingPolicy.FCFS:
            left_to_stock.append("order of requests (--scheduling-policy priority)")
        logger.info(
            "vllm-radix %s on vLLM %s: manager %s, scheduler %s, blocks of %d tokens, "
            "options: %s; left to stock vLLM: %s",
            vllm_radix.__version__,
            vllm_radix.vllm_version(),
            type(self.kv_cache_manager).__name__,
            type(self).__name__,
            self.block_size,
            self.radix_config,
            ", ".join(left_to_stock) or "nothing",
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Put the waiting queue in order, then let vLLM schedule."""
        if self._may_order and len(self.waiting) > 1 and self._can_admit():
            self._order_waiting()
        output = super().schedule(*args, **kwargs)
        if self._waiting_entries:
            self._note_admissions(output)
        return output

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Forget a request, however it ended."""
        self._forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _can_admit(self) -> bool:
        """Whether vLLM could admit a request in this step at all."""
        active = len(self.running) + self.num_waiting_for_streaming_input
        return (
            active < self.max_num_active_reqs
            and self.pause_state == PauseState.UNPAUSED
        )

    def _forget(self, request_id: str) -> None:
        self._waiting_entries.pop(request_id, None)
        self._probes.pop(request_id, None)

    def _order_waiting(self) -> None:
        """Order the queue in place: O(n log n), O(1) tree nodes per request."""
        requests = list(self.waiting)
        first = [request for request in requests if self._keeps_place(request)]
        movable = [request for request in requests if not self._keeps_place(request)]
        entries = [self._entry(request) for request in movable]
        pool = self.kv_cache_manager.block_pool
        if needs_order(entries, pool.num_blank_blocks):
            order = prefix_order(entries, self.radix_config.max_overtakes)
        else:
            order = sorted(range(len(entries)), key=lambda i: entries[i].arrival)
        ordered = first + [movable[index] for index in order]
        if ordered != requests:
            self.waiting.clear()
            self.waiting.extend(ordered)

    @staticmethod
    def _keeps_place(request: Request) -> bool:
        """Whether vLLM put a request at the head, where it is to stay."""
        return (
            request.status == RequestStatus.PREEMPTED or request.num_computed_tokens > 0
        )

    def _entry(self, request: Request) -> Waiting:
        """Return what the order needs to know, as of now."""
        request_id = request.request_id
        entry = self._waiting_entries.get(request_id)
        if entry is None:
            # New requests are at the tail, in order of arrival.
            entry = Waiting(arrival=self._arrivals)
            self._arrivals += 1
            self._waiting_entries[request_id] = entry
        pool = self.kv_cache_manager.block_pool
        entry.total = -(-request.num_tokens // self.block_size)
        if self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            limit = (request.num_tokens - 1) // self.block_size
            probe = pool.tree.probe(
                pool.keys.key(request, limit),
                pool.keys.namespace(request),
                limit,
                self._probes.get(request_id),
            )
            self._probes[request_id] = probe
            entry.cached = probe.num_blocks if probe else 0
        return entry

    def _note_admissions(self, output: SchedulerOutput) -> None:
        """Count, for each waiting request, who was admitted before it."""
        admitted = [
            self._waiting_entries.pop(request_id)
            for request_id in output.num_scheduled_tokens
            if request_id in self._waiting_entries
        ]
        if not admitted:
            return
        self._probes = {
            request_id: probe
            for request_id, probe in self._probes.items()
            if request_id in self._waiting_entries
        }
        latest = max(entry.arrival for entry in admitted)
        for entry in self._waiting_entries.values():
            if entry.arrival < latest:
                entry.overtaken += sum(
                    other.arrival > entry.arrival for other in admitted
                )


class AsyncRadixScheduler(RadixScheduler, AsyncScheduler):
    """``RadixScheduler`` for asynchronous scheduling."""
