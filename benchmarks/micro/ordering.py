"""CPU time of the ordering pass, by requests waiting.

    make bench

Prompts of 2,048 tokens in blocks of 16, 16 to a group with 1,024 tokens in common;
`hot`: half of the groups are cached. Each figure is one call of
`AdmissionController.plan_step` in vLLM's own loop, after the admissions of the step
before and what they inserted and evicted: look-ups and plan. A burst of arrivals is
looked up over several steps; those are among the passes. Thread-CPU medians and ranges.
SGLang's figures are of another machine of this kind (0.5.23, Python / Rust, longest
prefix).
"""

import random
import time
from contextlib import suppress
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_radix import RadixScheduler
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import VirtualRun
from vllm_radix_bench.sim.engine import make_scheduler
from vllm_radix_bench.workloads.turn import Turn

SIZES = (128, 1_000, 10_000)
PASSES = 15
BLOCK, TOKENS, SHARED, GROUP = 16, 2048, 1024, 16
GOALS = {128: 1.0, 1_000: 5.0, 10_000: 30.0}
SGLANG = {128: "4.9 / 2.6", 1_000: "45 / 22", 10_000: ""}


class Enough(Exception):
    """All passes were timed."""


def passes(waiting: int, hot: bool) -> list[float]:
    """Return the milliseconds of ordering passes, the first ones included.

    Args:
        waiting: requests in the queue.
        hot: whether half of the groups are cached.
    """
    groups = waiting // GROUP
    cached = groups // 2 if hot else 0
    scheduler = make_scheduler(
        RadixScheduler,
        block_size=BLOCK,
        num_blocks=cached * (SHARED // BLOCK + 1) + 600,
        max_num_seqs=2,
        max_num_batched_tokens=TOKENS + 16,
        max_model_len=TOKENS + 16,
    )
    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return rng.choices(range(3, 50_000), k=count)

    prefixes = [words(SHARED) for _ in range(groups)]
    run = VirtualRun(scheduler, CostModel())
    run.run([Turn(prefix, 1) for prefix in prefixes[:cached]])
    times: list[float] = []
    plan_step = scheduler.admission.plan_step

    def timed(*args: Any) -> None:
        start = time.thread_time()
        plan_step(*args)
        spent = (time.thread_time() - start) * 1e3
        if len(scheduler.waiting) > waiting // 2:
            times.append(spent)
        if len(times) > PASSES:
            raise Enough

    scheduler.admission.plan_step = timed
    queue = [
        Turn(prefixes[i % groups] + words(TOKENS - SHARED), 2) for i in range(waiting)
    ]
    with suppress(Enough):
        VirtualRun(scheduler, CostModel(), prefix="q").run(queue)
    return times


def main() -> None:
    """Print the table."""
    table = Table(title="ordering pass, ms of CPU (median, range)")
    for name in ("waiting", "cold", "hot", "goal", "SGLang, Python / Rust"):
        table.add_column(name, justify="right")
    times: dict[tuple[int, bool], list[float]] = {}
    for size in SIZES:
        for hot in (False, True):
            times[size, hot] = passes(size, hot)
    for size in SIZES:
        cells = []
        for hot in (False, True):
            one = sorted(times[size, hot])
            cells.append(f"{median(one):.2f} ({one[0]:.2f}-{one[-1]:.2f})")
        table.add_row(f"{size:,}", *cells, f"{GOALS[size]:g}", SGLANG[size])
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
