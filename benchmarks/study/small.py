"""Every order against every load: how the default was chosen, and what it trades.

    make policies

Runs the built-in workloads through the model-free engine, with each order at all
loads and seeds, and prints what each computes and how long requests wait, relative
to stock; draws the mean against the 99th percentile over the setting ``patience``.
The other orders run as published: without bounds and pins.
Counts are facts; times are of the cost model's clock. Seeds 3 and 4 were used for
nothing but the final table.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

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
    tail_ratios,
    tokens_column,
    ttft_column,
)

BLOCKS, BLOCK_SIZE = 256, 32
UNBOUNDED = {"max_overtakes": 10**9, "max_extra_wait": 1e9}
OTHERS = (
    "fcfs",
    "lpm",
    "k-lpm",
    "dfs",
    "hrrn",
    "shortest",
    "least-work-group",
    "window",
)
PATIENCE = (0.0, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5)
DEFAULT = "prefix 1"
SHOWN_SEEDS = (3, 4)


@dataclass(frozen=True)
class Cell:
    """A load: a workload, its size, and how its requests arrive.

    Attributes:
        workload: a key of ``BUILDERS``.
        load: arrivals over what stock serves; 0 sends all at once.
        pressure: working set over cache.
    """

    workload: str
    load: float
    pressure: float = 5.0

    @property
    def label(self) -> str:
        """A short name."""
        arrivals = f"at {self.load:g}x" if self.load else "at once"
        return f"{self.workload} {arrivals}, {self.pressure:g}x cache"


OFFLINE = [
    Cell(name, 0.0, pressure)
    for name in ("few-shot", "agents", "lookups", "chat")
    for pressure in (2.0, 5.0, 10.0)
] + [Cell("documents", 0.0), Cell("search", 0.0)]
ONLINE = [
    Cell(name, load)
    for name in (
        "few-shot",
        "lookups",
        "search",
        "agents",
        "documents",
        "chat",
        "flood",
        "control",
    )
    for load in (0.5, 0.9, 1.5, 2.5)
]


def arms() -> dict[str, dict[str, Any] | None]:
    """Return the options of each arm; None is stock."""
    out: dict[str, dict[str, Any] | None] = {"stock": None}
    out.update({name: {"policy": name, **UNBOUNDED} for name in OTHERS})
    out.update({f"prefix {p:g}": {"patience": p} for p in PATIENCE})
    return out


def run_cell(task: tuple[Cell, int]) -> Run:
    """Run all arms on one load with one seed."""
    from vllm_radix import RadixScheduler
    from vllm_radix_bench.replay import oracles
    from vllm_radix_bench.replay import runner as replay
    from vllm_radix_bench.replay.arms import radix_arm
    from vllm_radix_bench.replay.summary import summary
    from vllm_radix_bench.workloads.encoders import words
    from vllm_radix_bench.workloads.sizing import build
    from vllm_radix_bench.workloads.turn import longest_path

    cell, seed = task
    # The lengths of the A/B's workloads; a cache of 8,192 tokens.
    made = build(
        cell.workload,
        words,
        num_blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        pressure=cell.pressure,
        seed=seed,
    )
    options = replay.Options(
        [BLOCKS], block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=1024
    )
    replay.shuffle(made.roots, seed)
    if cell.load:
        replay.send_at_load(made.roots, cell.load, seed, options)
    longest = longest_path(made.roots)
    out = {}
    for name, radix in arms().items():
        arm = replay.parse_arm("stock") if radix is None else radix_arm(name, radix)
        outcome = replay.run_arm(arm, made.roots, BLOCKS, options, longest)
        out[name] = summary(outcome)
    flat, answers = oracles.known_in_advance(made.roots)
    known = replay.Arm("", RadixScheduler, {"policy": "fcfs"})
    outcome = replay.run_arm(known, flat, BLOCKS, options, longest, answers=answers)
    return {
        "load": cell.label,
        "seed": seed,
        "arms": out,
        "infinite": oracles.infinite_cache(made.roots),
        "known": outcome.computed_prompt_tokens,
    }


def known_ratio(runs: Sequence[Run]) -> float:
    """Return the tokens with all requests known in advance, relative to stock's."""
    return fmean(
        run["known"] / run["arms"]["stock"]["computed_prompt_tokens"] for run in runs
    )


COLUMNS = (
    LOAD,
    *(
        ttft_column(arm, arm)
        for arm in (
            "lpm",
            "k-lpm",
            "hrrn",
            "shortest",
            "least-work-group",
            "dfs",
            "window",
            DEFAULT,
        )
    ),
    tokens_column("tokens: lpm", "lpm"),
    tokens_column(f"tokens: {DEFAULT}", DEFAULT),
    Column("tokens: known in advance", known_ratio, "{:.2f}"),
)
"""Of the runs of a load: mean / p99 TTFT of arms, and tokens computed."""


def frontier(loads: Sequence[Sequence[Run]]) -> dict[str, tuple[float, float]]:
    """Return for each arm the geometric mean of means, and the worst tail."""
    return {
        arm: (
            geometric_mean(ratio(runs, arm, "ttft", "mean") for runs in loads),
            max(fmean(tail_ratios(runs, arm)) for runs in loads),
        )
        for arm in arms()
    }


def plot(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Draw mean against worst tail; the settings of the default are joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    line = [points[f"prefix {p:g}"] for p in PATIENCE]
    axes.plot(*zip(*line, strict=True), "o-", label="prefix, by patience")
    for p, (x, y) in zip(PATIENCE, line, strict=True):
        axes.annotate(f"{p:g}", (x, y), textcoords="offset points", xytext=(6, 4))
    for name in ("stock", *OTHERS):
        axes.plot(*points[name], "s", label=name)
    axes.axhline(1.1, linewidth=0.8, linestyle="--", color="grey")
    axes.set(
        xlabel="mean TTFT, relative to stock (geometric mean over loads)",
        ylabel="p99 TTFT, relative to stock (worst load)",
        yscale="log",
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.small", description=__doc__
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("results/policies.json"))
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    output, csv, png = outputs(parser, arguments.output, ".csv", ".png")
    tasks = [(cell, seed) for cell in OFFLINE + ONLINE for seed in arguments.seeds]
    results = collect(run_cell, tasks, os.cpu_count(), output)
    csv.write(csv_text(COLUMNS, by_load(results)))
    out = console(180)
    title = "TTFT mean / p99 (flood: the cold tenant's longest), tokens; stock is 1"
    out.print(table(title, COLUMNS, by_load(results)))
    shown = [run for run in results if run["seed"] in SHOWN_SEEDS]
    if set(SHOWN_SEEDS) < set(arguments.seeds):
        out.print(table(title + "; seeds 3 and 4 only", COLUMNS, by_load(shown)))
    online = {cell.label for cell in ONLINE}
    points = frontier(
        by_load([run for run in shown or results if run["load"] in online])
    )
    for name, (mean, tail) in points.items():
        out.print(f"{name:12} mean {mean:.3f}  worst p99 {tail:.2f}")
    say_where(out, "Every run", output, csv)
    try:
        plot(points, png.path)
        out.print(f"The plot is in {png.path}.")
    except OSError as error:
        png.failed = True
        print(
            f"--output: {png.path} cannot be written ({error.strerror})",
            file=sys.stderr,
        )
    return ExitCode.GOOD if all_written(output, csv, png) else ExitCode.OUTPUT


if __name__ == "__main__":
    sys.exit(main())
