"""What a unit of each part of the path costs, measured on this machine.

CPU is of one thread, the best of a few turns; bytes are those of vLLM's encoder and of
Python's memory. Prompts are random: equal ones are made so.
"""

import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
from prometheus_client import generate_latest
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_radix import RadixScheduler
from vllm_radix.metrics.collector import RadixStatLogger, unregister
from vllm_radix_bench.routing import parse_routing
from vllm_radix_bench.routing.base import EngineLoad
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import VirtualRun
from vllm_radix_bench.sim.engine import RequestMaker, make_scheduler, make_vllm_config
from vllm_radix_bench.workloads.turn import Turn

BLOCK_SIZE = 16
_TURNS = 3
_GROUPS, _EACH, _SHARED, _OWN, _ANSWER = 40, 10, 800, 200, 100
"""The load of an engine: prefixes, requests of each, tokens."""
_BLOCKS = 40 * 50
_FEW, _MANY = 8, 1000
"""Engines between which the cost of one more is measured."""
_SHORT, _LONG = 800, 3200
"""Prompts between which the cost of a token is measured."""


@dataclass(frozen=True)
class Units:
    """Unit costs; µs are of CPU.

    Attributes:
        stock_us_request: of vLLM's scheduler, a request.
        radix_us_request: of radix's, a request.
        radix_events_us_request: of radix's that tells events, a request.
        hash_us_token: to hash a token for the mirror by which events name blocks.
        stored_bytes_block: on the wire, a block that is stored.
        removed_bytes_block: on the wire, a block that is removed.
        encode_us_block: to encode an event of a block, either kind.
        apply_us_block: of a router, to apply such an event to its mirror.
        mirror_bytes_block: of a router's memory, a block in its mirror.
        history_bytes_chunk: of a router's memory, 16 tokens that were sent.
        affinity_us_token: of a router, to look a token of a prompt up.
        affinity_us_engine: of a router, for one more engine to choose from.
        queue_us_engine: of vLLM's balancer, for one more engine to choose from.
        stock_series_engine: metrics of an engine, without radix.
        radix_series_engine: metrics that radix adds.
        stock_scrape_bytes_engine: of them, in a scrape.
        radix_scrape_bytes_engine: of those that radix adds.
    """

    stock_us_request: float
    radix_us_request: float
    radix_events_us_request: float
    hash_us_token: float
    stored_bytes_block: float
    removed_bytes_block: float
    encode_us_block: float
    apply_us_block: float
    mirror_bytes_block: float
    history_bytes_chunk: float
    affinity_us_token: float
    affinity_us_engine: float
    queue_us_engine: float
    stock_series_engine: float
    radix_series_engine: float
    stock_scrape_bytes_engine: float
    radix_scrape_bytes_engine: float


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(1000, 120_000), k=count)


def _seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of the fastest turn."""
    best = float("inf")
    for _ in range(_TURNS):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return best


class Kept:
    """Keeps what a scheduler publishes.

    Attributes:
        batches: of events, one for each step that had some.
    """

    def __init__(self) -> None:
        self.batches: list[KVEventBatch] = []

    def publish(self, batch: KVEventBatch) -> None:
        """Keep the events of a step."""
        self.batches.append(batch)

    def shutdown(self) -> None:
        """Do nothing: no connection is open."""


def run_engine(cls: Any, kv_events: bool) -> tuple[float, list[KVEventBatch]]:
    """Return the scheduler's CPU of a request in µs, and its batches of events.

    The requests are those of ``_GROUPS`` prefixes in an order of no meaning, in a cache
    that does not hold them all.
    """
    rng = random.Random(0)
    prefixes = [_tokens(rng, _SHARED) for _ in range(_GROUPS)]
    roots = [Turn(p + _tokens(rng, _OWN), _ANSWER) for p in prefixes * _EACH]
    rng.shuffle(roots)
    more: dict[str, Any] = {}
    if kv_events:
        more["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True, publisher="null"
        )
    scheduler = make_scheduler(
        cls,
        block_size=BLOCK_SIZE,
        num_blocks=_BLOCKS,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        max_model_len=2048,
        **more,
    )
    kept = Kept()
    scheduler.kv_event_publisher = kept
    outcome = VirtualRun(scheduler, CostModel()).run(roots)
    scheduler.shutdown()
    return outcome.scheduler_cpu / len(roots) * 1e6, kept.batches


def _best_run(cls: Any, kv_events: bool) -> tuple[float, list[KVEventBatch]]:
    return min((run_engine(cls, kv_events) for _ in range(_TURNS)), key=lambda r: r[0])


def event_units(batches: Sequence[KVEventBatch]) -> dict[str, float]:
    """Return what events cost on the wire, to encode and to apply."""
    encode = msgspec.msgpack.Encoder().encode
    sizes = {True: 0, False: 0}
    blocks = {True: 0, False: 0}
    for batch in batches:
        for event in batch.events:
            is_stored = isinstance(event, BlockStored)
            sizes[is_stored] += len(encode(event))
            blocks[is_stored] += len(event.block_hashes)
    all_blocks = sum(blocks.values())

    def apply() -> None:
        rule = parse_routing("events").make(1)
        for batch in batches:
            rule.note_events(0, batch.events)

    seconds = _seconds(lambda: [encode(batch) for batch in batches])
    return {
        "stored_bytes_block": sizes[True] / blocks[True],
        "removed_bytes_block": sizes[False] / blocks[False],
        "encode_us_block": seconds / all_blocks * 1e6,
        "apply_us_block": _seconds(apply) / all_blocks * 1e6,
    }


def _bytes_of(make: Callable[[], Any]) -> float:
    """Return what a thing takes in Python's memory; it is kept until it is counted."""
    tracemalloc.start()
    made = make()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made is not None
    return float(taken)


def memory_units(batches: Sequence[KVEventBatch]) -> dict[str, float]:
    """Return what a router remembers of a block, and of a chunk that was sent."""
    held = 0

    def mirror() -> Any:
        nonlocal held
        rule: Any = parse_routing("events").make(1)
        for batch in batches:
            rule.note_events(0, batch.events)
        held = rule.holders.held[0]
        return rule

    rng, chunks = random.Random(1), 20_000
    prompts = [_tokens(rng, 100 * BLOCK_SIZE) for _ in range(chunks // 100)]

    def history() -> Any:
        rule = parse_routing("history").make(1)
        for prompt in prompts:
            rule.choose(prompt, None, [EngineLoad()])
        return rule

    taken = _bytes_of(mirror)
    return {
        "mirror_bytes_block": taken / held,
        "history_bytes_chunk": _bytes_of(history) / chunks,
    }


def _choice_us(rule: str, engines: int, length: int) -> float:
    """Return the µs of a choice among engines for prompts that were sent before."""
    made = parse_routing(rule).make(engines)
    loads = [EngineLoad(in_flight=1) for _ in range(engines)]
    rng = random.Random(2)
    prompts = [_tokens(rng, length) for _ in range(100)]
    for prompt in prompts:
        made.choose(prompt, None, loads)
    spent = _seconds(lambda: [made.choose(p, None, loads) for p in prompts])
    return spent / len(prompts) * 1e6


def _balancer_us(engines: int) -> float:
    """Return the µs of a choice of vLLM's own between so many engines."""
    names = [str(number) for number in range(engines)]
    client = SimpleNamespace(
        reqs_in_flight={},
        core_engines=names,
        lb_engines=[[0, 1, 0.25] for _ in names],
        eng_start_index=0,
        client_count=1,
        engine_inflight=Counter(names),
    )
    requests = [
        SimpleNamespace(request_id=i, data_parallel_rank=None, pooling_params=None)
        for i in range(100)
    ]

    def work() -> None:
        client.reqs_in_flight.clear()
        for request in requests:
            DPLBAsyncMPClient.get_core_engine_for_request(client, request)

    return _seconds(work) / len(requests) * 1e6


def choice_units() -> dict[str, float]:
    """Return what a token of a prompt and an engine more cost a router."""
    base = _choice_us("history", _FEW, _SHORT)
    longer = _choice_us("history", _FEW, _LONG)
    wider = _choice_us("history", _MANY, _SHORT)
    queue = [_balancer_us(count) for count in (_FEW, _MANY)]
    return {
        "affinity_us_token": (longer - base) / (_LONG - _SHORT),
        "affinity_us_engine": (wider - base) / (_MANY - _FEW),
        "queue_us_engine": (queue[1] - queue[0]) / (_MANY - _FEW),
    }


def hash_units() -> dict[str, float]:
    """Return what vLLM's block hashes cost a token."""
    scheduler = make_scheduler(Scheduler, block_size=BLOCK_SIZE, max_model_len=4096)
    maker, rng = RequestMaker(scheduler), random.Random(3)
    requests = [maker.make(str(i), _tokens(rng, _LONG), 1) for i in range(50)]
    hasher = get_request_block_hasher(BLOCK_SIZE, get_hash_fn_by_name("sha256"))

    def work() -> None:
        for request in requests:
            request.block_hashes = []
            hasher(request)

    return {"hash_us_token": _seconds(work) / (50 * _LONG) * 1e6}


def metric_units() -> dict[str, float]:
    """Return the series of an engine and their bytes in a scrape."""
    config = make_vllm_config(BLOCK_SIZE, _BLOCKS)
    config.model_config.served_model_name = "model"
    found: dict[tuple[bool, int], tuple[int, int]] = {}
    for engines in (1, 3):
        numbers = list(range(engines))
        for with_radix in (False, True):
            unregister()
            loggers: list[Any] = [PrometheusStatLogger(config, numbers)]
            if with_radix:
                loggers.append(RadixStatLogger(config, numbers, says=False))
            text = generate_latest().decode()
            lines = [one for one in text.splitlines() if not one.startswith("#")]
            found[with_radix, engines] = len(lines), sum(map(len, lines)) + len(lines)

    def each(with_radix: bool, what: int) -> float:
        few, many = found[with_radix, 1][what], found[with_radix, 3][what]
        return (many - few) / 2

    return {
        "stock_series_engine": each(False, 0),
        "radix_series_engine": each(True, 0) - each(False, 0),
        "stock_scrape_bytes_engine": each(False, 1),
        "radix_scrape_bytes_engine": each(True, 1) - each(False, 1),
    }


def measure() -> Units:
    """Measure all unit costs; about a minute."""
    stock, _ = _best_run(Scheduler, False)
    radix, _ = _best_run(RadixScheduler, False)
    told, batches = _best_run(RadixScheduler, True)
    return Units(
        stock_us_request=stock,
        radix_us_request=radix,
        radix_events_us_request=told,
        **event_units(batches),
        **memory_units(batches),
        **choice_units(),
        **hash_units(),
        **metric_units(),
    )
