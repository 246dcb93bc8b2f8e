"""CPU time of the scheduler where nothing is shared: stock and radix in turns.

    make bench

Drives vLLM's real scheduler on the model-free engine and sums the thread's CPU
time in `add_request`, `schedule` and `update_from_output`; and, beside it, the same
with the making of the request, where stock hashes the prompt. Prints medians of
the ratios of interleaved pairs.
"""

import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix import RadixScheduler
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import VirtualRun
from vllm_radix_bench.sim.engine import make_scheduler
from vllm_radix_bench.workloads.turn import Turn

PAIRS = 9
REQUESTS = 60
CASES = [(16, 300), (16, 1000), (16, 3000), (128, 1000)]
"""Block size and tokens of a prompt; 16 tokens are generated."""


def cpu_ms(cls: type, size: int, length: int) -> tuple[float, float, int]:
    """Return CPU ms of the three calls, of all, and engine steps."""
    scheduler = make_scheduler(
        cls,
        block_size=size,
        num_blocks=10 * length // size + 2,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
    )
    calls = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                calls += time.thread_time() - start

        return call

    for name in ("add_request", "schedule", "update_from_output"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 50) for _ in range(length)] for _ in range(REQUESTS)]
    run = VirtualRun(scheduler, CostModel())
    outcome = run.run([Turn(prompt, 16) for prompt in prompts])
    return calls * 1e3, outcome.scheduler_cpu * 1e3, outcome.engine_steps


def main() -> None:
    """Print the comparison."""
    table = Table(title="scheduler CPU, nothing shared: radix over stock")
    for name in ("block", "prompt", "stock ms", "its three calls", "with the request"):
        table.add_column(name, justify="right")
    for size, length in CASES:
        pairs = []
        for _ in range(PAIRS):
            stock = cpu_ms(Scheduler, size, length)
            radix = cpu_ms(RadixScheduler, size, length)
            assert radix[2] == stock[2], "radix took other steps"
            pairs.append((stock, radix))
        ratios = [sorted(radix[i] / stock[i] for stock, radix in pairs) for i in (0, 1)]
        table.add_row(
            str(size),
            str(length),
            f"{median(stock[0] for stock, _ in pairs):.0f}",
            *(f"{median(r):.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in ratios),
        )
    Console(width=88).print(table)


if __name__ == "__main__":
    main()
