"""The scheduler: vLLM's own, with the waiting queue put in order first.

Before vLLM's ``schedule()`` runs, unchanged, the waiting requests are ordered
by what of them is cached. vLLM then admits from the front, as always.
"""

import time
from collections.abc import Callable
from typing import Any

import vllm_radix
from vllm_radix.config import RadixConfig
from vllm_radix.engine.admission import AdmissionController
from vllm_radix.engine.compat import (
    AsyncScheduler,
    FCFSRequestQueue,
    KVCacheConfig,
    PauseState,
    Request,
    RequestQueue,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    SchedulerStats,
    SchedulingPolicy,
    VllmConfig,
    defers_prefills,
    logger,
)
from vllm_radix.engine.hint_notes import BlockHintNotes, HintNotes
from vllm_radix.engine.hybrid_manager import HybridKVCacheManager
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.engine.point_hint_notes import PointHintNotes
from vllm_radix.engine.public_prefixes import make_public_prefixes
from vllm_radix.engine.recorder import TrafficRecorder
from vllm_radix.engine.support import (
    early_problem,
    feature_problem,
    is_one_full_group,
    layout_problem,
    stock_scheduler_cls,
    whole_blocks_reason,
)
from vllm_radix.engine.tree_manager import TreeKVCacheManager
from vllm_radix.metrics.sampler import Sampler
from vllm_radix.policy import StepCapacity
from vllm_radix.tree import POLICIES


class RadixScheduler(Scheduler):
    """vLLM's scheduler over a radix tree; pass it as ``scheduler_cls``.

    Called with vLLM's arguments. Returns the asynchronous variant when the
    configuration asks for asynchronous scheduling, and a stock scheduler when
    the model is not supported and ``on_unsupported`` is ``stock``.

    Raises:
        ValueError: an option is wrong, or the model or a setting is not
            supported; the message is one sentence that names the fix.
    """

    kv_cache_manager: TreeKVCacheManager
    waiting: RequestQueue

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
            early_problem(vllm_config, config)
            or layout_problem(kv_cache_config)
            or feature_problem(vllm_config, kv_cache_config, config)
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
        least = self._min_sub_block_tokens(config)
        self._hint_notes: HintNotes | None = None
        if is_one_full_group(self.kv_cache_config):
            RadixKVCacheManager.adopt(
                self.kv_cache_manager,
                POLICIES[config.eviction](),
                mirror=mirror,
                min_sub_block_tokens=least,
                explain=config.explain,
                num_draft_tokens=self.num_spec_tokens + self.num_lookahead_tokens,
            )
            notes: type[HintNotes] = BlockHintNotes
        else:
            HybridKVCacheManager.adopt(
                self.kv_cache_manager,
                mirror,
                least,
                config.explain,
                num_draft_tokens=self.num_spec_tokens + self.num_lookahead_tokens,
                lookahead=vllm_config.num_prefill_lookahead_tokens,
            )
            notes = PointHintNotes
        if self.kv_cache_manager.enable_caching:
            pool = self.kv_cache_manager.block_pool
            self._hint_notes = pool.hint_notes = notes(
                pool.tree,
                pool.keys,
                config.tenant or "cache_salt",
                int(config.hint_quota * pool.num_gpu_blocks),
                lambda: self._clock(),
            )
        public = make_public_prefixes(config, vllm_config.model_config)
        self.kv_cache_manager.block_pool.keys.public = public
        if public is not None:
            logger.info("All cache salts share %s", public)
        self._clock: Callable[[], float] = time.monotonic
        self.admission: AdmissionController | None = None
        # A priority queue's order is a promise to the user: left alone.
        if (
            config.policy != "fcfs"
            and self.policy == SchedulingPolicy.FCFS
            and isinstance(self.waiting, FCFSRequestQueue)
        ):
            self.admission = AdmissionController(
                self.kv_cache_manager,
                config,
                self._inflight_prefills,
                lambda: self._clock(),
            )
            self.waiting = self.admission.queue
        self.tally = self.kv_cache_manager.block_pool.tally
        self._sampler = Sampler(self)
        self.recorder: TrafficRecorder | None = None
        if config.record:
            keys = self.kv_cache_manager.block_pool.keys
            self.recorder = TrafficRecorder(
                vllm_config, config, keys, lambda: self._clock()
            )
        self._announce()

    @property
    def wants_lazy_hashes(self) -> bool:
        """Whether block hashes should wait until somebody reads them."""
        return not self.kv_cache_manager.block_pool.mirror

    @property
    def left_to_stock(self) -> tuple[str, ...]:
        """What is served as stock vLLM does, and why."""
        return tuple(self._left_to_stock)

    def _min_sub_block_tokens(self, config: RadixConfig) -> int | None:
        """Return the option, or None where a hit must end with a block."""
        if not config.sub_block:
            return None
        reason = whole_blocks_reason(self.vllm_config, self.kv_cache_config)
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

    @property
    def clock(self) -> Callable[[], float]:
        """Returns the time, in seconds; set it to run on another clock."""
        return self._clock

    @clock.setter
    def clock(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        if self.kv_cache_manager.miss_log is not None:
            self.kv_cache_manager.miss_log.clock = clock

    def schedule(
        self, throttle_prefills: bool = False, *args: Any, **kwargs: Any
    ) -> SchedulerOutput:
        """Plan which waiting requests go first, then let vLLM schedule."""
        admission = self.admission
        now = self.tally.now = self._clock()
        if self._hint_notes is not None:
            self._hint_notes.expire(now)
        if admission is None:
            return super().schedule(throttle_prefills, *args, **kwargs)
        began = time.perf_counter()
        deferred = defers_prefills(self, throttle_prefills)
        capacity = None if deferred else self._capacity()
        if capacity is None:
            admission.skip_step(now)
        else:
            admission.plan_step(capacity, now)
            self.tally.ordering_seconds.add(time.perf_counter() - began)
        output = super().schedule(throttle_prefills, *args, **kwargs)
        admission.end_step(output, self.kv_holding_waiting, now)
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Return vLLM's statistics of a step, with radix's now and then."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._sampler.add_to(stats, self._clock())
        return stats

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the cache, and with it what was learned of the traffic."""
        done: bool = super().reset_prefix_cache(*args, **kwargs)
        if done and self.admission is not None:
            self.admission.forget_rates()
        return done

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """End a step where a state is to be kept, if vLLM does not end it before."""
        tokens: int = super()._mamba_block_aligned_split(
            request,
            num_new_tokens,
            num_new_local_computed_tokens,
            num_external_computed_tokens,
        )
        start = request.num_computed_tokens + num_new_local_computed_tokens
        start += num_external_computed_tokens
        end = start + tokens
        return self.kv_cache_manager.next_stop(request, start, end) - start

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Add a request to the waiting queue."""
        if self.recorder is not None:
            self.recorder.note_arrival(request)
        super().add_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        """Release what is held outside of the engine."""
        super().shutdown()
        if self.recorder is not None:
            self.recorder.writer.close()

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Forget a request, however it ended."""
        if self.recorder is not None:
            self.recorder.record(request)
        if self.admission is not None:
            self.admission.remove(request)
        return super()._free_request(request, *args, **kwargs)

    def _chunk(self) -> int:
        """Return the tokens of one prompt that a step computes; 0 for no limit."""
        chunk: int = self.scheduler_config.long_prefill_token_threshold
        if chunk > 0 and self.adaptive_long_prefill_threshold:
            eligible = sum(self.get_request_counts())
            budget = self.scheduler_config.max_num_batched_tokens
            chunk = max(chunk, budget // max(1, eligible))
        return max(0, chunk)

    def _capacity(self) -> StepCapacity | None:
        """Return what the next step can admit; None when that is no request."""
        if not self.waiting or self.pause_state != PauseState.UNPAUSED:
            return None
        if len(self.waiting) < 2 and not self._inflight_prefills:
            return None
        active = len(self.running) + self.num_waiting_for_streaming_input
        chunk = self._chunk()
        # Each running request takes a token, or more; a prompt that is computed in
        # chunks takes the rest of it, or of the budget.
        tokens = self.max_num_scheduled_tokens - len(self.running)
        for request in self._inflight_prefills:
            if request.status == RequestStatus.RUNNING:
                rest = request.num_tokens - request.num_computed_tokens - 1
                rest = max(0, min(rest, chunk - 1) if chunk else rest)
                if rest and self.need_mamba_block_aligned_split:
                    rest = self._mamba_block_aligned_split(request, rest)
                tokens -= rest
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if self.running:
            blocks -= self.kv_cache_manager.watermark_blocks
        slots = self.max_num_active_reqs - active
        if min(slots, tokens, blocks) <= 0:
            return None
        if self.lora_config is None:
            return StepCapacity(slots, tokens, blocks, chunk=chunk)
        adapters = (r.lora_request for r in self.running if r.lora_request)
        return StepCapacity(
            slots,
            tokens,
            blocks,
            chunk=chunk,
            adapters=frozenset(adapter.lora_int_id for adapter in adapters),
            max_adapters=self.lora_config.max_loras,
        )


class AsyncRadixScheduler(RadixScheduler, AsyncScheduler):
    """``RadixScheduler`` for asynchronous scheduling."""
