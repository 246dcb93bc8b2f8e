"""Every large load against stock, with the orders that users would compare.

    make policies

Runs `large_loads` through the model-free engine and prints time to the first token
(mean / p99, and with a cold tenant its longest), tokens computed and the scheduler's
CPU, relative to stock. Counts are facts; times are of the cost model's clock. Seeds 5,
6 and 7 were used for nothing but the committed table.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import all_written
from vllm_radix_bench.report.tables import console, say_where, table
from vllm_radix_bench.study.results import (
    LOAD,
    Run,
    by_load,
    collect,
    outputs,
    ratio,
    tokens_column,
    ttft_column,
)
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
    from vllm_radix_bench.replay.runner import Options

UNBOUNDED = '"max_overtakes": 1000000000, "max_extra_wait": 1e9'
ARMS = {
    "stock": "stock",
    "prefix": "radix",
    "lpm": f'radix:{{"policy": "lpm", {UNBOUNDED}}}',
    "k-lpm": f'radix:{{"policy": "k-lpm", {UNBOUNDED}}}',
    "window": f'radix:{{"policy": "window", {UNBOUNDED}}}',
}
FINAL_SEEDS = (5, 6, 7)


def make(load: Load, seed: int) -> "tuple[Roots, int, Options]":
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


def run_load(task: tuple[str, int, tuple[str, ...]]) -> Run:
    """Run some arms on one load with one seed.

    Args:
        task: the load's name, the seed, and the arms.
    """
    from vllm_radix_bench.replay import runner as replay
    from vllm_radix_bench.replay.summary import summary

    name, seed, arms = task
    load = next(load for load in LOADS if load.name == name)
    roots, blocks, options = make(load, seed)
    longest = longest_path(roots)
    out: Run = {"load": name, "seed": seed, "blocks": blocks, "arms": {}}
    for arm in arms:
        outcome = replay.run_arm(
            replay.parse_arm(ARMS[arm]), roots, blocks, options, longest
        )
        made = summary(outcome)
        made["scheduler_cpu"] = outcome.scheduler_cpu
        out["arms"][arm] = made
    return out


def columns(arms: Sequence[str]) -> list[Column]:
    """Return the columns, of the runs of a load.

    Args:
        arms: beside stock; the scheduler's CPU is of the first one.
    """
    out = [LOAD]
    for arm in arms:
        out.append(ttft_column(f"{arm}: mean / p99 (worst)", arm, worst=True))
        out.append(tokens_column(f"{arm}: tokens", arm))
    cpu = Column(
        f"CPU of {arms[0]}",
        lambda runs: ratio(runs, arms[0], "scheduler_cpu"),
        "{:.2f}",
    )
    return [*out, cpu]


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    names = [load.name for load in LOADS]
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.large", description=__doc__
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[1:], choices=list(ARMS))
    parser.add_argument("--loads", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("results/large.json"))
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    output, csv = outputs(parser, arguments.output, ".csv")
    arms = [arm for arm in arguments.arms if arm != "stock"] or ["prefix"]
    tasks = [
        (load, seed, ("stock", *arms))
        for load in arguments.loads
        for seed in arguments.seeds
    ]
    rows = by_load(collect(run_load, tasks, arguments.jobs, output))
    csv.write(csv_text(columns(arms), rows))
    seeds = ", ".join(map(str, arguments.seeds))
    title = (
        f"TTFT (flood: the cold tenant's longest), tokens; stock is 1; seeds {seeds}"
    )
    out = console(200)
    out.print(table(title, columns(arms), rows))
    say_where(out, "Every run", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


if __name__ == "__main__":
    sys.exit(main())
