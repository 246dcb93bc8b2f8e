"""Hands requests that have ended to the trace of the server's traffic."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm_radix
from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import Request, VllmConfig
from vllm_radix.engine.hints import portable_hints
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.tenants import Tenants
from vllm_radix.record import EndedRequest, TraceWriter, path_problem
from vllm_radix.tree import BYTES_PER_TOKEN

_MIN_KNOWN_TOKENS = 8 << 20
_KNOWN_PER_CACHED = 4
"""Tokens of earlier requests that are kept, and for each token of the cache."""


class TrafficRecorder:
    """Records each request when it ends, however it does; see ``TraceWriter``.

    Args:
        vllm_config: the engine's.
        config: options of radix.
        keys: of the engine's requests.
        clock: returns the time, in seconds.

    Raises:
        OSError: the file cannot be written.
        ValueError: that of this engine holds something else.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: RadixConfig,
        keys: RequestKeys,
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._tenants = Tenants(config)
        self._started: float | None = None
        self._num_arrived = 0
        # Number of each, when it came, and what vLLM will note of its prompt.
        self._arrived: dict[str, tuple[int, float, Any]] = {}
        rank = vllm_config.parallel_config.data_parallel_index
        path = engine_path(config.record, rank)
        problem = path_problem(str(path))
        if problem is not None:
            raise ValueError(f"radix option 'record': {problem}")
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        blocks = (cache.num_gpu_blocks or 1) - 1
        known = max(_MIN_KNOWN_TOKENS, _KNOWN_PER_CACHED * blocks * cache.block_size)
        self.writer = TraceWriter(
            path,
            config.record_limit_mb,
            known,
            {
                "server": {
                    "vllm": vllm_radix.vllm_version(),
                    "vllm_radix": vllm_radix.__version__,
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "blocks": blocks,
                    "block_size": cache.block_size,
                    "max_num_seqs": scheduler.max_num_seqs,
                    "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                }
            },
            config.record_tokens,
        )

    def note_arrival(self, request: Request) -> None:
        """Note when a request came; an input of a session came with the first."""
        if request.request_id in self._arrived:
            return
        now = self._clock()
        if self._started is None:
            self._started = now
        arrived = self._num_arrived, now, request.prefill_stats
        self._arrived[request.request_id] = arrived
        self._num_arrived += 1

    def record(self, request: Request) -> None:
        """Hand over a request that has ended: O(its tokens, to copy them)."""
        arrived = self._arrived.pop(request.request_id, None)
        if arrived is None or self._started is None:
            return
        number, at, stats = arrived
        keys = self._keys
        tokens, plain = request.num_tokens, keys.is_plain(request)
        if not plain:
            # Whole blocks only: media are in their keys, and may be shared so.
            tokens -= tokens % keys.block_size
        key = keys.without_salt(request, keys.key(request, tokens))
        params = request.sampling_params
        admitted = stats is not None and stats.num_prompt_tokens > 0
        self.writer.put(
            EndedRequest(
                number,
                at - self._started,
                bytes(memoryview(key)[: tokens * BYTES_PER_TOKEN]),
                request.num_prompt_tokens,
                request.num_tokens - request.num_prompt_tokens,
                str(request.get_finished_reason()),
                stats.num_cached_tokens if admitted else None,
                keys.owner(request),
                self._tenants.name_of(request),
                request.priority,
                plain,
                1 if plain else keys.block_size,
                portable_hints(params and params.extra_args),
            )
        )


def engine_path(path: str, rank: int) -> Path:
    """Return the file of an engine: the first one's as it is named, others' by rank."""
    file = Path(path)
    return file.with_name(f"{file.stem}.dp{rank}{file.suffix}") if rank else file
