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
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

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


def run_cell(task: tuple[Cell, int]) -> dict[str, Any]:
    """Run all arms on one load with one seed."""
    from vllm_radix import RadixScheduler
    from vllm_radix_bench.replay import oracles
    from vllm_radix_bench.replay import runner as replay
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
        arm = replay.parse_arm(
            "stock" if radix is None else "radix:" + json.dumps(radix)
        )
        outcome = replay.run_arm(arm, made.roots, BLOCKS, options, longest)
        out[name] = replay.summary(outcome)
        cold = out[name]["tenants"].get("cold")
        out[name]["cold_max"] = cold and cold["max"]
    flat, answers = oracles.known_in_advance(made.roots)
    known = replay.Arm("", RadixScheduler, {"policy": "fcfs"})
    outcome = replay.run_arm(known, flat, BLOCKS, options, longest, answers=answers)
    return {
        "cell": cell.label,
        "seed": seed,
        "arms": out,
        "infinite": oracles.infinite_cache(made.roots),
        "known": outcome.computed_prompt_tokens,
    }


def ratio(runs: list[dict[str, Any]], arm: str, *path: str) -> float:
    """Return the mean over seeds of a figure, relative to stock's."""

    def of(run: dict[str, Any], name: str) -> float:
        value = run["arms"][name]
        for key in path:
            value = value[key]
        return float(value)

    return fmean(of(run, arm) / of(run, "stock") for run in runs)


def tails(runs: list[dict[str, Any]], arm: str) -> float:
    """Return the p99 TTFT, or with a cold tenant its longest, relative to stock's."""
    if runs[0]["arms"]["stock"]["cold_max"]:
        return ratio(runs, arm, "cold_max")
    return ratio(runs, arm, "ttft", "p99")


def table(results: list[dict[str, Any]], seeds: tuple[int, ...], title: str) -> Table:
    """Return mean / p99 TTFT and tokens computed of every arm on every load."""
    shown = [
        "lpm",
        "k-lpm",
        "hrrn",
        "shortest",
        "least-work-group",
        "dfs",
        "window",
        DEFAULT,
    ]
    out = Table(title=title)
    for name in ("load", *shown, "tokens: lpm", DEFAULT, "known in advance"):
        out.add_column(name, justify="left" if name == "load" else "right")
    labels = list(dict.fromkeys(run["cell"] for run in results))
    for label in labels:
        runs = [r for r in results if r["cell"] == label and r["seed"] in seeds]
        if not runs:
            continue
        known = fmean(
            run["known"] / run["arms"]["stock"]["computed_prompt_tokens"]
            for run in runs
        )
        out.add_row(
            label,
            *(
                f"{ratio(runs, a, 'ttft', 'mean'):.2f} / {tails(runs, a):.2f}"
                for a in shown
            ),
            f"{ratio(runs, 'lpm', 'computed_prompt_tokens'):.2f}",
            f"{ratio(runs, DEFAULT, 'computed_prompt_tokens'):.2f}",
            f"{known:.2f}",
        )
    return out


def frontier(
    results: list[dict[str, Any]], labels: list[str]
) -> dict[str, tuple[float, float]]:
    """Return for each arm the geometric mean of means, and the worst tail."""
    out = {}
    for arm in arms():
        by_load = [[r for r in results if r["cell"] == label] for label in labels]
        by_load = [runs for runs in by_load if runs]
        out[arm] = (
            geometric_mean(ratio(runs, arm, "ttft", "mean") for runs in by_load),
            max(tails(runs, arm) for runs in by_load),
        )
    return out


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


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("results/policies.json"))
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    tasks = [(cell, seed) for cell in OFFLINE + ONLINE for seed in arguments.seeds]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(run_cell, tasks), total=len(tasks)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))
    console = Console(width=None if sys.stdout.isatty() else 180)
    title = "TTFT mean / p99 (flood: the cold tenant's longest), tokens; stock is 1"
    console.print(table(results, tuple(arguments.seeds), title))
    if set(SHOWN_SEEDS) < set(arguments.seeds):
        console.print(table(results, SHOWN_SEEDS, title + "; seeds 3 and 4 only"))
    final = [r for r in results if r["seed"] in SHOWN_SEEDS] or results
    online = frontier(final, [cell.label for cell in ONLINE])
    for name, (mean, tail) in online.items():
        console.print(f"{name:12} mean {mean:.3f}  worst p99 {tail:.2f}")
    plot(online, arguments.output.with_suffix(".png"))
    console.print(f"{arguments.output} and {arguments.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
