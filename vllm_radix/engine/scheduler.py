"""The scheduler: vLLM's own, with the waiting queue put in order first.

Before vLLM's ``schedule()`` runs, unchanged, the waiting requests are ordered
by what of them is cached. vLLM then admits from the front, as always.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
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
from vllm_radix.engine.support import (
    config_problem,
    install_problem,
    layout_problem,
    stock_scheduler_cls,
)
from vllm_radix.policy import Waiting, needs_order, prefix_order
from vllm_radix.tree import POLICIES, Namespace, Probe


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
        problem = (
            install_problem()
            or config_problem(vllm_config)
            or layout_problem(kv_cache_config)
        )
        if problem is not None:
            if config.on_unsupported == "error":
                raise ValueError(problem)
            logger.warning("Serving with stock vLLM, as asked: %s", problem)
            stock = stock_scheduler_cls(vllm_config)
            return stock(vllm_config, kv_cache_config, *args, **kwargs)
        asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
        if asynchronous and not issubclass(cls, AsyncScheduler):
            if cls is not RadixScheduler:
                raise ValueError(
                    f"{cls.__qualname__} derives from RadixScheduler, and scheduling "
                    "is asynchronous: derive it from AsyncRadixScheduler, or start "
                    "with --no-async-scheduling."
                )
            cls = AsyncRadixScheduler
        return super().__new__(cls)

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.radix_config = RadixConfig.from_additional_config(
            vllm_config.additional_config
        )
        config = self.radix_config
        self._left_to_stock: list[str] = []
        # Whoever reads block hashes gets vLLM's own map; nobody else pays for it.
        connected = self.connector is not None
        mirror = connected or self.aux_output_connector is not None
        RadixKVCacheManager.adopt(
            self.kv_cache_manager,
            POLICIES[config.eviction](),
            mirror=mirror,
            min_sub_block_tokens=self._min_sub_block_tokens(config),
            explain=config.explain,
            num_draft_tokens=self.num_spec_tokens + self.num_lookahead_tokens,
        )
        # Requests seen waiting, by id; kept while they wait.
        self._queued: dict[str, _Queued] = {}
        # Those with a cached prefix; the others by the first block they look for.
        self._warm: set[str] = set()
        self._cold: dict[tuple[Namespace, bytes], set[str]] = {}
        self._reordered = False
        self._arrivals = 0
        # What the last order was made from; the same again needs no new one.
        self._ordered_at: object = None
        # A priority queue's order is a promise to the user: left alone.
        self._may_order = (
            self.radix_config.policy == "prefix"
            and self.policy == SchedulingPolicy.FCFS
            and isinstance(self.waiting, FCFSRequestQueue)
        )
        if self._may_order:
            self.kv_cache_manager.block_pool.tree.first_blocks = []
        self._announce()

    @property
    def wants_lazy_hashes(self) -> bool:
        """Whether block hashes should wait until somebody reads them."""
        return not self.kv_cache_manager.block_pool.mirror

    def _min_sub_block_tokens(self, config: RadixConfig) -> int | None:
        """Return the option, or None where a hit must end with a block."""
        if not config.sub_block:
            return None
        reason = None
        speculative = self.vllm_config.speculative_config
        if self.connector is not None:
            reason = "a KV connector, which knows whole blocks"
        elif self.aux_output_connector is not None:
            reason = "outputs kept beside the KV, which are not copied"
        elif speculative is not None and speculative.uses_draft_kv_cache():
            reason = "a draft model, which has KV of its own"
        elif self.dcp_world_size > 1:
            reason = "context parallelism, which spreads a block over devices"
        elif not str(self.parallel_config.worker_cls).startswith("vllm.v1.worker."):
            reason = "a worker that is not vLLM's own and may not copy blocks"
        if reason is not None:
            self._left_to_stock.append(f"hits inside a block ({reason})")
            return None
        return config.min_sub_block_tokens

    def _announce(self) -> None:
        left_to_stock = self._left_to_stock
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

    def add_request(self, request: Request) -> None:
        """Add a request; its key is made now, not in the middle of a step."""
        super().add_request(request)
        # The next input of a streaming session comes under the session's id.
        if self._may_order and self.requests.get(request.request_id) is request:
            self._enqueue(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Put the waiting queue in order, then let vLLM schedule."""
        if self._may_order:
            self._wake()
            if len(self.waiting) > 1 and self._can_admit():
                self._order_waiting()
        output = super().schedule(*args, **kwargs)
        if self._queued:
            self._note_admissions(output)
        return output

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Forget a request, however it ended."""
        self._dequeue(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _can_admit(self) -> bool:
        """Whether vLLM could admit a request in this step at all."""
        active = len(self.running) + self.num_waiting_for_streaming_input
        return (
            active < self.max_num_active_reqs
            and self.pause_state == PauseState.UNPAUSED
            and self.kv_cache_manager.block_pool.get_num_free_blocks() > 0
        )

    # -- who waits -------------------------------------------------------------

    def _enqueue(self, request: Request) -> "_Queued":
        """Note a waiting request, after all that are noted."""
        size = self.block_size
        keys = self.kv_cache_manager.block_pool.keys
        limit = request.num_tokens - 1
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            limit = 0
        queued = _Queued(
            arrival=self._arrivals,
            total=-(-request.num_tokens // size),
            limit=limit,
            namespace=keys.namespace(request),
        )
        self._arrivals += 1
        self._queued[request.request_id] = queued
        if limit >= size:
            queued.key = keys.key(request, limit)
            self._look_up(request.request_id, queued)
        return queued

    def _dequeue(self, request_id: str) -> "_Queued | None":
        """Forget a request that does not wait any more."""
        queued = self._queued.pop(request_id, None)
        if queued is not None:
            if request_id in self._warm:
                self._warm.discard(request_id)
            elif queued.first is not None:
                waiting = self._cold[queued.first]
                waiting.discard(request_id)
                if not waiting:
                    del self._cold[queued.first]
        return queued

    def _look_up(self, request_id: str, queued: "_Queued") -> None:
        """Look up the prefix of a request, and file it as warm or cold."""
        tree = self.kv_cache_manager.block_pool.tree
        queued.probe = probe = tree.probe(
            queued.key, queued.namespace, queued.limit, queued.probe
        )
        queued.cached = probe.num_blocks if probe else 0
        if queued.cached:
            self._warm.add(request_id)
            return
        self._warm.discard(request_id)
        if queued.first is None:
            queued.first = queued.namespace, queued.key[: tree.block_bytes]
        self._cold.setdefault(queued.first, set()).add(request_id)

    def _wake(self) -> None:
        """Look up the cold requests whose first block has come into the cache.

        O(requests inserted since): the others are as cold as they were.
        """
        first_blocks = self.kv_cache_manager.block_pool.tree.first_blocks
        if first_blocks:
            for first in first_blocks:
                for request_id in self._cold.pop(first, ()):
                    queued = self._queued.get(request_id)
                    if queued is not None:
                        self._look_up(request_id, queued)
            first_blocks.clear()

    # -- in which order --------------------------------------------------------

    @property
    def _unused_blocks(self) -> int:
        """Free blocks whose content nobody will miss."""
        pool = self.kv_cache_manager.block_pool
        return pool.num_blank_blocks + pool.tree.num_tails

    def _order_state(self) -> object:
        """What the order depends on: tree, free blocks, and who waits."""
        pool = self.kv_cache_manager.block_pool
        ends = self.waiting[0].request_id, self.waiting[-1].request_id
        return pool.tree.version, self._unused_blocks, len(self.waiting), *ends

    def _order_waiting(self) -> None:
        """Order the queue in place: O(n log n), O(1) tree nodes per warm request.

        O(1) while nothing is cached for anybody who waits.
        """
        if not self._warm and not self._reordered:
            return
        if self._order_state() == self._ordered_at:
            return
        for request_id in list(self._warm):
            self._look_up(request_id, self._queued[request_id])
        requests = list(self.waiting)
        # Preempted requests keep the head of the queue.
        first = [request for request in requests if self._keeps_place(request)]
        movable = [request for request in requests if not self._keeps_place(request)]
        queued = [self._seen(request) for request in movable]
        if needs_order(queued, self._unused_blocks):
            order = prefix_order(queued, self.radix_config.max_overtakes)
            self._reordered = True
        else:
            order = sorted(range(len(queued)), key=lambda i: queued[i].arrival)
            self._reordered = False
        ordered = first + [movable[index] for index in order]
        if ordered != requests:
            self.waiting.clear()
            self.waiting.extend(ordered)
        self._ordered_at = self._order_state()

    def _seen(self, request: Request) -> Waiting:
        """Return what the order needs to know of a waiting request."""
        queued = self._queued.get(request.request_id) or self._enqueue(request)
        if request.status != RequestStatus.WAITING:
            # Its grammar is not ready: no reason to go first.
            return replace(queued, cached=0)
        return queued

    @staticmethod
    def _keeps_place(request: Request) -> bool:
        """Whether vLLM put a request at the head, where it is to stay."""
        return (
            request.status == RequestStatus.PREEMPTED or request.num_computed_tokens > 0
        )

    def _note_admissions(self, output: SchedulerOutput) -> None:
        """Count, for each waiting request, who was admitted before it."""
        gone = [new.req_id for new in output.scheduled_new_reqs]
        gone += output.scheduled_cached_reqs.resumed_req_ids
        # An asynchronous KV load takes its blocks without being scheduled yet.
        gone += [request.request_id for request in self.kv_holding_waiting]
        if not gone:
            return
        admitted = sorted(
            queued.arrival for queued in map(self._dequeue, gone) if queued is not None
        )
        if not admitted:
            return
        # In order of arrival, as they were put in.
        for queued in self._queued.values():
            if queued.arrival > admitted[-1]:
                break
            queued.overtaken += len(admitted) - bisect_right(admitted, queued.arrival)


@dataclass(slots=True)
class _Queued(Waiting):
    """A waiting request, and how to look up its prefix again."""

    limit: int = 0
    namespace: Namespace = None
    key: bytes = b""
    first: tuple[Namespace, bytes] | None = None
    probe: Probe | None = None


class AsyncRadixScheduler(RadixScheduler, AsyncScheduler):
    """``RadixScheduler`` for asynchronous scheduling."""
