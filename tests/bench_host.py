"""CPU time of the scheduler where nothing is shared: stock and radix in turns.

    .venv/bin/python tests/bench_host.py

Drives vLLM's real scheduler on the model-free engine and sums the thread's CPU
time in `add_request`, `schedule` and `update_from_output`. Prints the medians and
the ratio of each pair of runs.
"""

import random
import time
from statistics import median

from engine_double import EngineDouble, make_scheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix import RadixScheduler

PAIRS = 9
REQUESTS = 60


def cpu_ms(cls: type) -> tuple[float, int]:
    """Return CPU time in ms and engine steps, for requests of 300 tokens."""
    made = make_scheduler(
        cls, num_blocks=129, max_num_seqs=8, max_num_batched_tokens=1024
    )
    engine = EngineDouble(made, check=False)
    spent = 0.0
    for name in ("add_request", "schedule", "update_from_output"):
        method = getattr(made, name)

        def timed(*args, method=method, **kwargs):
            nonlocal spent
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent += time.thread_time() - start

        setattr(made, name, timed)
    rng = random.Random(0)
    for i in range(REQUESTS):
        engine.add(str(i), [rng.randrange(3, 50) for _ in range(300)], 16)
    engine.run()
    return spent * 1e3, engine.steps


def main() -> None:
    """Print the comparison."""
    runs = [(cpu_ms(Scheduler), cpu_ms(RadixScheduler)) for _ in range(PAIRS)]
    stock, radix = ([pair[i][0] for pair in runs] for i in (0, 1))
    ratios = sorted(r / s for s, r in zip(stock, radix, strict=True))
    steps = runs[0][0][1]
    assert runs[0][1][1] == steps, "radix took other steps"
    print(
        f"stock {median(stock):.0f} ms, radix {median(radix):.0f} ms in {steps} steps; "
        f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"{(median(radix) - median(stock)) / REQUESTS:+.2f} ms a request"
    )


if __name__ == "__main__":
    main()
