"""Several engines: what routing, radix inside of them, and both are worth.

    python -m vllm_radix_bench.study engines

Few-shot, document and chat loads through 2, 4 and 8 engines, each with a cache of 8,192
tokens and at most 8 running requests, behind every routing rule, with stock schedulers
and with radix. The working set is a multiple of all caches together, and requests come
at a multiple of what stock engines serve in turn. Tokens are facts: the schedulers are
vLLM's. Times are of the cost model's clock.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.cli_types import InputError, WithDefaults, number, whole
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import Rows, all_written
from vllm_radix_bench.report.tables import console, print_table, say, say_where
from vllm_radix_bench.routing import MOST_ENGINES, ROUTINGS, parse_routing
from vllm_radix_bench.study.results import (
    LOAD,
    Run,
    add_run_options,
    by_load,
    collect,
    outputs,
)

BLOCKS, BLOCK_SIZE = 256, 32
RUNNING, STEP_TOKENS = 8, 1024
WORKLOADS = "few-shot", "documents", "chat"
ENGINES = 2, 4, 8
ARRIVALS = (0.8, 0.9), (4.0, 2.0), (4.0, 0.0)
"""Working set over all caches, and load; 0 sends all at once."""
ARMS = "stock", "radix"
_KEPT = (
    "requests",
    "prompt_tokens",
    "computed_prompt_tokens",
    "engine_steps",
    "preemptions",
    "seconds",
    "ttft",
    "imbalance",
    "engines",
)
"""Of a summary."""


@dataclass(frozen=True)
class Cell:
    """A load on so many engines.

    Attributes:
        workload: a key of ``BUILDERS``.
        engines: how many.
        pressure: working set over all caches.
        rate: arrivals over what stock serves; 0 sends all at once.
        seed: of all choices.
    """

    workload: str
    engines: int
    pressure: float
    rate: float
    seed: int

    @property
    def label(self) -> str:
        """A short name."""
        arrivals = f"load {self.rate:g}" if self.rate else "at once"
        return (
            f"{self.workload}, {self.pressure:g}x, {arrivals}, {self.engines} engines"
        )


def run_cell(task: tuple[Cell, tuple[str, ...]]) -> Run:
    """Run some rules on one cell, stock and radix.

    Args:
        task: the cell, and the rules.
    """
    from vllm_radix_bench.replay import runner as replay
    from vllm_radix_bench.replay.oracles import infinite_cache
    from vllm_radix_bench.replay.summary import summary
    from vllm_radix_bench.workloads.encoders import words
    from vllm_radix_bench.workloads.sizing import REFERENCE_CACHE, build
    from vllm_radix_bench.workloads.turn import longest_path

    cell, rules = task
    options = replay.Options(
        [BLOCKS],
        block_size=BLOCK_SIZE,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=STEP_TOKENS,
        engines=cell.engines,
    )
    made = build(
        cell.workload,
        words,
        num_blocks=cell.engines * BLOCKS,
        block_size=BLOCK_SIZE,
        pressure=cell.pressure,
        seed=cell.seed,
        # Lengths are those for the cache of one engine.
        scale=BLOCKS * BLOCK_SIZE / REFERENCE_CACHE,
    )
    replay.shuffle(made.roots, cell.seed)
    if cell.rate:
        replay.send_at_load(made.roots, cell.rate, cell.seed, options)
    longest = longest_path(made.roots)
    out: Run = {"load": cell.label, **asdict(cell), "routings": {}}
    out["fewest"] = infinite_cache(made.roots)
    for rule in rules:
        out["routings"][rule] = {}
        for arm in ARMS:
            outcome = replay.run_fleet(
                replay.parse_arm(arm),
                made.roots,
                BLOCKS,
                options,
                longest,
                parse_routing(rule),
            )
            whole_summary = summary(outcome)
            kept = {name: whole_summary[name] for name in _KEPT}
            kept["ttft"] = {name: kept["ttft"][name] for name in ("mean", "p99")}
            kept["engines"] = [one["computed_prompt_tokens"] for one in kept["engines"]]
            out["routings"][rule][arm] = kept
    return out


def figure(runs: Sequence[Run], rule: str, arm: str, *path: str) -> float:
    """Return the mean over seeds of a figure of a rule and an arm."""

    def of(run: Run) -> float:
        value = run["routings"][rule][arm]
        for key in path:
            value = value[key]
        return float(value)

    return fmean(map(of, runs))


def _tokens(runs: Sequence[Run], rule: str) -> dict[str, float]:
    """Return the thousands of tokens of both arms."""
    return {
        arm: figure(runs, rule, arm, "computed_prompt_tokens") / 1000 for arm in ARMS
    }


def fewest(runs: Sequence[Run]) -> float:
    """Return the thousands of tokens that must be computed, each prefix once."""
    return fmean(run["fewest"] for run in runs) / 1000


def tokens_columns(rules: Sequence[str]) -> list[Column]:
    """Return the columns of tokens computed; rows are the runs of a load."""
    shown = "{stock:,.0f} → {radix:,.0f}"
    each = [Column(rule, partial(_tokens, rule=rule), shown) for rule in rules]
    return [LOAD, *each, Column("fewest", fewest, "{:,.0f}")]


def _times(runs: Sequence[Run], rule: str) -> dict[str, float]:
    return {
        f"{arm}_{part}": figure(runs, rule, arm, "ttft", part)
        for arm in ARMS
        for part in ("mean", "p99")
    }


def _balance(runs: Sequence[Run], rule: str) -> dict[str, float]:
    return {arm: figure(runs, rule, arm, "imbalance", "tokens") for arm in ARMS}


def time_columns(rules: Sequence[str]) -> list[Column]:
    """Return the columns of TTFT, mean and 99th percentile."""
    shown = "{stock_mean:.2f} → {radix_mean:.2f} / {stock_p99:.2f} → {radix_p99:.2f} s"
    return [
        LOAD,
        *(Column(f"TTFT, {r}", partial(_times, rule=r), shown) for r in rules),
    ]


def balance_columns(rules: Sequence[str]) -> list[Column]:
    """Return the columns of the busiest engine's tokens over the mean."""
    shown = "{stock:.2f} → {radix:.2f}"
    return [
        LOAD,
        *(Column(f"busiest, {r}", partial(_balance, rule=r), shown) for r in rules),
    ]


def sentences(runs: Sequence[Run], rules: Sequence[str]) -> list[str]:
    """Return the load on which each rule is furthest from the fewest, with radix."""

    def factor(run: Run, rule: str) -> float:
        tokens: int = run["routings"][rule]["radix"]["computed_prompt_tokens"]
        return tokens / float(run["fewest"])

    out = []
    for rule in rules:
        worst = max(runs, key=partial(factor, rule=rule))
        mean = fmean(factor(run, rule) for run in runs)
        out.append(
            f"{rule} with radix: {mean:.2f} times the fewest in the mean of "
            f"{len(runs)} runs, {factor(worst, rule):.2f} at worst ({worst['load']})"
        )
    return out


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that are asked for, those that take longest first."""
    return [
        Cell(workload, engines, pressure, rate, seed)
        for engines in sorted(set(arguments.engines), reverse=True)
        for pressure, rate in reversed(ARRIVALS)
        for workload in dict.fromkeys(arguments.workloads)
        for seed in dict.fromkeys(arguments.seeds)
    ]


def _in_order(run: Run) -> tuple[int, float, float, int, int]:
    load = run["rate"] or float("inf")
    number = WORKLOADS.index(run["workload"])
    return number, run["pressure"], load, run["engines"], run["seed"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.engines",
        description=__doc__,
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add(
        "--workloads",
        nargs="+",
        default=list(WORKLOADS),
        choices=WORKLOADS,
        metavar="NAME",
    )
    add(
        "--engines",
        nargs="+",
        type=partial(number, int, 1, MOST_ENGINES),
        default=list(ENGINES),
        metavar="N",
        help="how many",
    )
    add("--routing", nargs="+", default=list(ROUTINGS), metavar="RULE", help="rules")
    add("--seeds", type=whole(0), nargs="+", default=[0], metavar="N", help="of loads")
    add_run_options(parser, "engines", "the table goes", os.cpu_count())
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rules = tuple(dict.fromkeys(arguments.routing))
    try:
        for rule in rules:
            parse_routing(rule)
    except InputError as error:
        parser.error(str(error))
    output, csv = outputs(parser, arguments.output, ".csv")
    tasks = [(cell, rules) for cell in cells_of(arguments)]
    runs = sorted(collect(run_cell, tasks, arguments.jobs, output), key=_in_order)
    output.write_json(Rows(runs))
    rows = by_load(runs)
    tables = tokens_columns(rules), time_columns(rules), balance_columns(rules)
    csv.write(csv_text([*tables[0], *tables[1][1:], *tables[2][1:]], rows))
    out = console(200)
    title = "Thousands of prompt tokens computed, stock → radix"
    print_table(out, title, tables[0], rows)
    print_table(out, "TTFT on the cost model's clock: mean / p99", tables[1], rows)
    print_table(out, "Tokens computed by the busiest engine / mean", tables[2], rows)
    for sentence in sentences(runs, rules):
        say(out, sentence)
    say_where(out, "Every run", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


if __name__ == "__main__":
    sys.exit(main())
