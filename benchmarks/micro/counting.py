"""CPU time that counting for metrics costs the scheduler: with and without in turns.

    make bench

Drives radix's scheduler on the model-free engine, as ``micro.scheduler`` does, where
prefixes are shared and the cache is too small, and where nothing is shared. The arms
take turns; each figure is the median of the ratios of neighbours.
"""

import gc
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_radix import RadixScheduler
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import VirtualRun
from vllm_radix_bench.sim.engine import make_scheduler
from vllm_radix_bench.workloads.turn import Turn

ROUNDS = 15
CASES = {"shared, under pressure": (40, 400, 600), "nothing shared": (300, 300, 1000)}
"""Number of prefixes, requests, tokens of a prefix; 60 more are each request's own."""


class NoTally:
    """Stands for a ``Tally``, and counts nothing."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally
        self.now = 0.0
        self.evicted_blocks = tally.evicted_blocks
        self.ordering_seconds = self

    def add(self, *arguments: Any) -> None:
        """Do nothing, and so all below."""

    note_lookup = note_idle = note_evicted = note_admission = note_reason = add


def cpu_ms(case: tuple[int, int, int], counts: bool, explain: bool = False) -> float:
    """Return CPU ms of the scheduler's three calls.

    Args:
        case: one of ``CASES``.
        counts: whether anything is counted, and sent.
        explain: whether misses are explained.
    """
    prefixes, requests, length = case
    scheduler = make_scheduler(
        RadixScheduler,
        block_size=16,
        num_blocks=1500,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        radix={"explain": explain},
    )
    if not counts:
        none = NoTally(scheduler.tally)
        scheduler.tally = scheduler.kv_cache_manager.block_pool.tally = none
        scheduler._sampler.add_to = none.add
    total = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                total += time.thread_time() - start

        return call

    for name in ("add_request", "schedule", "update_from_output"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    rng = random.Random(0)
    shared = [[rng.randrange(3, 50) for _ in range(length)] for _ in range(prefixes)]
    turns = [
        Turn(shared[i % prefixes] + [rng.randrange(3, 50) for _ in range(60)], 16)
        for i in range(requests)
    ]
    gc.collect()
    VirtualRun(scheduler, CostModel()).run(turns)
    return total * 1e3


def main(rounds: int = ROUNDS) -> None:
    """Print the comparison.

    Args:
        rounds: how often each arm runs.
    """
    table = Table(title="scheduler CPU: with counts over without")
    for name in ("requests", "without, ms", "with counts", "with explain, too"):
        table.add_column(name, justify="right", no_wrap=True)
    for title, case in CASES.items():
        rows = [
            (cpu_ms(case, False), cpu_ms(case, True), cpu_ms(case, True, explain=True))
            for _ in range(rounds)
        ]
        table.add_row(
            title,
            f"{median(row[0] for row in rows):.0f}",
            *(f"{median(row[arm] / row[0] for row in rows):.3f}" for arm in (1, 2)),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
