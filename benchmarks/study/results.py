"""What all studies do with their runs: make them, save them, compare them.

A run is a dict with the load's name, the seed, and the summary of each arm; see
``replay.summary.summary``.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from vllm_radix_bench.report.cli_types import number, whole
from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.output import OutputError, OutputFile, Rows

Run = dict[str, Any]

LOAD = Column("load", lambda runs: runs[0]["load"])


def add_run_options(
    parser: argparse.ArgumentParser, name: str, tables: str, jobs: int | None
) -> None:
    """Add the options that say how runs are made, and where they go.

    Args:
        parser: of the study.
        name: of its file of runs.
        tables: what goes beside it: the table goes, or the tables go.
        jobs: processes, unless told otherwise.
    """
    add = parser.add_argument
    add("--jobs", type=whole(1), default=jobs, metavar="N", help="processes")
    add(
        "--output",
        "--json",
        type=Path,
        default=Path(f"results/{name}.json"),
        metavar="FILE",
        help=f"where to write every run; {tables} beside it, as CSV",
    )


def add_trace_sizes(parser: argparse.ArgumentParser, default: Sequence[int]) -> None:
    """Add the options of a trace, and of the caches for it, in tokens."""
    add = parser.add_argument
    add("--limit", type=whole(1), metavar="N", help="of the trace: only the first N")
    add(
        "--tokens",
        type=partial(number, int, 1000, 10**9),
        nargs="+",
        default=list(default),
        metavar="N",
        help="of the cache, for the trace",
    )


def outputs(
    parser: argparse.ArgumentParser, path: Path, *suffixes: str
) -> list[OutputFile]:
    """Return the file of the runs, and one beside it for each suffix, all writable.

    Ends the program if two would be the same file, or one cannot be written.
    """
    if path.suffix in suffixes:
        parser.error(
            f"--output: {path} is also where what is made of the runs goes; allowed: "
            f"a suffix other than {' and '.join(suffixes)}"
        )
    try:
        files = [OutputFile(path)]
        files += [OutputFile(path.with_suffix(suffix)) for suffix in suffixes]
        for file in files:
            file.prepare()
    except OutputError as error:
        parser.exit(error.code, f"{parser.prog}: {error}\n")
    return files


def collect(
    run: Callable[[Any], Run],
    tasks: Sequence[Any],
    jobs: int | None,
    output: OutputFile,
) -> list[Run]:
    """Run all tasks in processes; save what there is after each."""
    results = []
    with ProcessPoolExecutor(jobs) as pool:
        for result in tqdm(pool.map(run, tasks), total=len(tasks)):
            results.append(result)
            output.write_json(Rows(results))
    return results


def by_load(results: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each load together, in the order of the loads."""
    loads: dict[str, list[Run]] = {}
    for run in results:
        loads.setdefault(run["load"], []).append(run)
    return list(loads.values())


def ratio(runs: Sequence[Run], arm: str, *path: str) -> float:
    """Return the mean over seeds of a figure, relative to stock's."""

    def of(run: Run, name: str) -> float:
        value = run["arms"][name]
        for key in path:
            value = value[key]
        return float(value)

    return fmean(of(run, arm) / of(run, "stock") for run in runs)


def tail_ratios(runs: Sequence[Run], arm: str) -> list[float]:
    """Return each run's p99 TTFT, relative to stock's.

    With a cold tenant it is that tenant's longest TTFT.
    """
    cold = "cold" in runs[0]["arms"]["stock"]["tenants"]
    path = ("tenants", "cold", "max") if cold else ("ttft", "p99")
    return [ratio([run], arm, *path) for run in runs]


def ttft_column(title: str, arm: str, *, worst: bool = False) -> Column:
    """Return the column of an arm's TTFT, relative to stock's; rows are runs.

    Args:
        title: of the column.
        arm: its name.
        worst: whether to show the p99 of the worst seed too.
    """

    def value(runs: Sequence[Run]) -> dict[str, float]:
        tails = tail_ratios(runs, arm)
        mean = ratio(runs, arm, "ttft", "mean")
        return {"mean": mean, "p99": fmean(tails), "worst": max(tails)}

    last = " ({worst:.2f})" if worst else ""
    return Column(title, value, "{mean:.2f} / {p99:.2f}" + last)


def tokens_column(title: str, arm: str) -> Column:
    """Return the column of the tokens that an arm computes, relative to stock's."""
    return Column(
        title, lambda runs: ratio(runs, arm, "computed_prompt_tokens"), "{:.2f}"
    )
