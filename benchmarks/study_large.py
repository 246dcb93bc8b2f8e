"""Every large load against stock, with the orders that users would compare.

    make policies

Runs `large_loads` through the model-free engine and prints time to the first token
(mean / p99, and with a cold tenant its longest), tokens computed and the scheduler's
CPU, relative to stock. Counts are facts; times are of the cost model's clock. Seeds 5,
6 and 7 were used for nothing but the committed table.
"""

import argparse
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_radix_bench.policies import ratio
from vllm_radix_bench.workloads.large_loads import (
    BLOCK_SIZE,
    LOADS,
    Load,
    Roots,
    follow_each_other,
)
from vllm_radix_bench.workloads.sizing import BlockCounter
from vllm_radix_bench.workloads.turn import longest_path

if TYPE_CHECKING:
    from vllm_radix_bench.replay import runner as replay

UNBOUNDED = '"max_overtakes": 1000000000, "max_extra_wait": 1e9'
ARMS = {
    "stock": "stock",
    "prefix": "radix",
    "lpm": f'radix:{{"policy": "lpm", {UNBOUNDED}}}',
    "k-lpm": f'radix:{{"policy": "k-lpm", {UNBOUNDED}}}',
    "window": f'radix:{{"policy": "window", {UNBOUNDED}}}',
}
FINAL_SEEDS = (5, 6, 7)


def make(load: Load, seed: int) -> "tuple[Roots, int, replay.Options]":
    """Return the requests of a load, the blocks of its cache, and the options.

    Arrivals are the same for all arms.
    """
    from vllm_radix_bench.replay import runner as replay

    rng = random.Random(f"{load.name.partition(',')[0]} {seed}")
    roots = load.build(rng)
    rng.shuffle(roots)
    blocks = int(load.cache * BlockCounter(BLOCK_SIZE).add(roots))
    options = replay.Options(
        [blocks],
        block_size=BLOCK_SIZE,
        max_num_seqs=load.slots,
        known_in_advance=False,
    )
    if load.sessions:
        roots = list(follow_each_other(roots, load.sessions))
    if load.rate:
        replay.send_at_load(roots, load.rate, seed, options)
        for at, root in enumerate(roots):
            root.arrival = roots[at - at % load.burst].arrival
    return roots, blocks, options


def run_load(task: tuple[str, int, tuple[str, ...]]) -> dict[str, Any]:
    """Run some arms on one load with one seed.

    Args:
        task: the load's name, the seed, and the arms.
    """
    from vllm_radix_bench.replay import runner as replay

    name, seed, arms = task
    load = next(load for load in LOADS if load.name == name)
    roots, blocks, options = make(load, seed)
    longest = longest_path(roots)
    out: dict[str, Any] = {"load": name, "seed": seed, "blocks": blocks, "arms": {}}
    for arm in arms:
        outcome = replay.run_arm(
            replay.parse_arm(ARMS[arm]), roots, blocks, options, longest
        )
        made = replay.summary(outcome)
        made["scheduler_cpu"] = outcome.scheduler_cpu
        out["arms"][arm] = made
    return out


def tails(runs: list[dict[str, Any]], arm: str) -> list[float]:
    """Return each run's p99, or its cold tenant's longest wait, relative to stock's."""
    out = []
    for run in runs:
        mine, stock = run["arms"][arm], run["arms"]["stock"]
        tenants = mine["tenants"]
        if "cold" in tenants:
            longest = stock["tenants"]["cold"]["max"]
            out.append(tenants["cold"]["max"] / longest)
        else:
            out.append(mine["ttft"]["p99"] / stock["ttft"]["p99"])
    return out


def table(results: list[dict[str, Any]], arms: list[str], title: str) -> Table:
    """Return a row a load: mean / p99 (worst seed), tokens and CPU of each arm."""
    out = Table(title=title)
    out.add_column("load")
    for arm in arms:
        out.add_column(f"{arm}: mean / p99 (worst)", justify="right")
        out.add_column("tokens", justify="right")
    out.add_column(f"CPU of {arms[0]}", justify="right")
    for load in dict.fromkeys(run["load"] for run in results):
        runs = [run for run in results if run["load"] == load]
        cells = []
        for arm in arms:
            tail = tails(runs, arm)
            mean = ratio(runs, arm, "ttft", "mean")
            cells.append(f"{mean:.2f} / {fmean(tail):.2f} ({max(tail):.2f})")
            cells.append(f"{ratio(runs, arm, 'computed_prompt_tokens'):.2f}")
        out.add_row(load, *cells, f"{ratio(runs, arms[0], 'scheduler_cpu'):.2f}")
    return out


def main() -> int:
    """Run everything."""
    names = [load.name for load in LOADS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[1:], choices=list(ARMS))
    parser.add_argument("--loads", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("results/large.json"))
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    arms = [arm for arm in arguments.arms if arm != "stock"] or ["prefix"]
    tasks = [
        (load, seed, ("stock", *arms))
        for load in arguments.loads
        for seed in arguments.seeds
    ]
    results = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for result in tqdm(pool.map(run_load, tasks), total=len(tasks)):
            results.append(result)
            arguments.output.write_text(json.dumps(results, indent=1))
    console = Console(width=None if sys.stdout.isatty() else 200)
    seeds = ", ".join(map(str, arguments.seeds))
    title = (
        f"TTFT (flood: the cold tenant's longest), tokens; stock is 1; seeds {seeds}"
    )
    console.print(table(results, arms, title))
    console.print(str(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
