"""Layouts of hybrid models against stock: shared prefixes, and too small a cache.

    python -m vllm_radix_bench.study hybrid

Two parts, both through the model-free engine, where counts are facts. Traffic: three
loads with room for everything, one by one and as a backlog; tokens computed, against
the fewest possible. Pressure: sessions over pools that do not hold them all; the hit
rate at known points and at points drawn at random, with a mark where an arm is below
stock.
"""

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.cli_types import WithDefaults, number, whole
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import all_written
from vllm_radix_bench.report.tables import console, print_table, say, say_where
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.study.results import (
    LOAD,
    Run,
    add_run_options,
    collect,
    outputs,
)
from vllm_radix_bench.workloads.hybrid_loads import (
    ORDERS,
    TRAFFIC,
    Sessions,
    Waves,
    draw_sessions,
    fewest_tokens,
    generated_after_first,
    one_by_one,
    roots_of,
)
from vllm_radix_bench.workloads.turn import longest_path

if TYPE_CHECKING:
    from vllm_radix_bench.replay.runner import Options

PARTS = ("traffic", "pressure")
ROOM = {"full/528+mamba/528x3": 4000, "full/16+swa:1024/16": 20_000}
"""Layouts of the traffic, and blocks of a pool that holds all of it."""
WAYS: dict[str, Callable[[Waves], Waves]] = {
    "one by one": one_by_one,
    "backlog": lambda waves: waves,
}
POOLS = {
    "full/512+mamba/512x3": (50, 60, 75, 90),
    "full/32+swa:128/32": (360, 390, 420, 450),
    "full/32+swa:1024/32": (520, 600, 700, 800),
    "swa:512/32x2+full/32": (520, 600, 700, 800),
}
"""Pools at the edge of what six sessions need: the known points."""
DRAWN = (*POOLS, "full/128+mamba/128", "full/32+chunked:256/32")
"""Layouts of the points that are drawn."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Pools of those: what all sessions need in the end, times one of these."""
_SLOTS, _TOKENS_IN_A_STEP = 64, 2048


@dataclass(frozen=True)
class Cell:
    """A load, a layout and a pool.

    Attributes:
        part: of the study.
        load: what is sent: a key of ``TRAFFIC`` and one of ``WAYS``, or of sessions
            their sizes.
        layout: of the cache.
        blocks: of the pool, with the null block.
        seed: of the load.
        sessions: of the part pressure.
    """

    part: str
    load: str
    layout: str
    blocks: int
    seed: int
    sessions: Sessions | None = None

    def waves(self) -> Waves:
        """Return what is sent."""
        if self.sessions is not None:
            return self.sessions.waves(self.seed)
        name, _, way = self.load.partition(", ")
        return WAYS[way](TRAFFIC[name](self.seed))


def traffic_cells(seed: int) -> list[Cell]:
    """Return the cells of the part traffic."""
    return [
        Cell("traffic", f"{name}, {way}", layout, blocks, seed)
        for layout, blocks in ROOM.items()
        for name in TRAFFIC
        for way in WAYS
    ]


def pressure_cells(seed: int, points: int) -> list[Cell]:
    """Return the cells of the part pressure.

    Args:
        seed: of loads, and of the points that are drawn.
        points: number of these.
    """
    known = Sessions()
    out = [
        Cell("pressure", _said(known), layout, blocks, seed, known)
        for layout, pools in POOLS.items()
        for blocks in pools
    ]
    rng = random.Random(f"hybrid {seed}")
    for index in range(points):
        layout = DRAWN[index % len(DRAWN)]
        drawn = draw_sessions(rng, ORDERS[index // len(DRAWN) % len(ORDERS)])
        blocks = _pool(drawn, layout, seed, rng.choice(SHARES))
        out.append(Cell("pressure", _said(drawn), layout, blocks, seed, drawn))
    return out


def _said(load: Sessions) -> str:
    return (
        f"{load.sessions} sessions, {load.rounds} rounds, {load.start} tokens, "
        f"answers of {load.answer}, {load.order}"
    )


def _pool(load: Sessions, layout: str, seed: int, share: float) -> int:
    """Return a share of the blocks that all sessions need, or what vLLM starts with."""
    from vllm_radix_bench.sim.engine import blocks_for

    parsed = Layout.parse(layout)
    roots, _ = roots_of(load.waves(seed))
    longest = longest_path(roots)
    paths: dict[tuple[int, ...], int] = {}
    for root in roots:
        paths[tuple(root.tokens[: load.start])] = len(root.tokens) + load.answer
    needed = sum(parsed.blocks_to_keep(tokens) for tokens in paths.values())
    least = blocks_for(parsed, 1, longest + 1, _TOKENS_IN_A_STEP)
    return 1 + max(least, int(share * needed))


def options_of(layout: str) -> "Options":
    """Return the options of a replay over a layout."""
    from vllm_radix_bench.replay import runner as replay

    return replay.Options(
        [],
        max_num_seqs=_SLOTS,
        max_num_batched_tokens=_TOKENS_IN_A_STEP,
        layout=layout,
        known_in_advance=False,
    )


def run_cell(task: tuple[Cell, tuple[str, ...]]) -> Run:
    """Run some arms on one cell.

    Args:
        task: the cell, and the arms.
    """
    from vllm_radix_bench.replay import runner as replay
    from vllm_radix_bench.replay.summary import summary

    cell, arms = task
    roots, answers = roots_of(cell.waves())
    options, longest = options_of(cell.layout), longest_path(roots)
    out: Run = {**asdict(cell), "fewest": fewest_tokens(roots), "arms": {}}
    for arm in arms:
        outcome = replay.run_arm(
            replay.parse_arm(arm),
            roots,
            # One more is vLLM's own, the null block.
            cell.blocks - 1,
            options,
            longest,
            answers=answers,
        )
        made = summary(outcome)
        out["arms"][arm] = {
            "computed_tokens": outcome.computed_prompt_tokens
            + generated_after_first(roots),
            **{
                name: made[name] for name in ("hit_rate", "engine_steps", "preemptions")
            },
        }
    return out


def share_of_the_way(run: Run, arm: str) -> float | None:
    """Return how far an arm is from stock to the fewest tokens; 1 is all the way."""
    stock = run["arms"]["stock"]["computed_tokens"]
    way = stock - run["fewest"]
    return (stock - run["arms"][arm]["computed_tokens"]) / way if way else None


def is_below(run: Run, arm: str) -> bool:
    """Return whether stock finds more in the cache."""
    return bool(run["arms"][arm]["hit_rate"] < run["arms"]["stock"]["hit_rate"])


def _of(arm: str, name: str) -> Callable[[Run], float]:
    return lambda run: run["arms"][arm][name]


def columns(part: str, arms: Sequence[str]) -> list[Column]:
    """Return the columns of a part; rows are runs."""
    first = Column(LOAD.title, lambda run: run["load"], is_name=True)
    out = [first, Column("layout", lambda run: run["layout"], is_name=True)]
    out.append(Column("pool, blocks", lambda run: run["blocks"], "{:,}"))
    out.append(Column("seed", lambda run: run["seed"], "{:d}"))
    traffic = part == "traffic"
    if traffic:
        out.append(Column("fewest possible", lambda run: run["fewest"], "{:,}"))
    for arm in arms:
        if traffic:
            tokens, steps = _of(arm, "computed_tokens"), _of(arm, "engine_steps")
            out.append(Column(f"{arm}: tokens", tokens, "{:,}"))
            out.append(Column(f"{arm}: steps", steps, "{:,}"))
        out.append(Column(f"{arm}: hit rate", _of(arm, "hit_rate"), "{:.3f}"))
        if arm == "stock":
            continue
        if traffic:
            way = partial(share_of_the_way, arm=arm)
            out.append(Column(f"{arm}: share of the way", way, "{:.0%}"))
        else:
            mark = partial(_mark, arm=arm)
            out.append(Column(f"{arm}: against stock", mark))
    return out


def _mark(run: Run, arm: str) -> str:
    return "below stock" if is_below(run, arm) else ""


def all_columns(arms: Sequence[str]) -> list[Column]:
    """Return the columns of the file with all runs, of either part."""
    titles: dict[str, Column] = {}
    for part in PARTS:
        titles |= {column.title: column for column in columns(part, arms)}
    return [Column("part", lambda run: run["part"]), *titles.values()]


def sentences(runs: Sequence[Run], arms: Sequence[str]) -> list[str]:
    """Return what is to be said of the part pressure: hit rates, and losses."""
    means = {arm: fmean(run["arms"][arm]["hit_rate"] for run in runs) for arm in arms}
    return [
        f"{arm}: mean hit rate {means['stock']:.3f} → {means[arm]:.3f}; below stock at "
        f"{sum(is_below(run, arm) for run in runs)} of {len(runs)} points"
        for arm in arms
        if arm != "stock"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.hybrid",
        description=__doc__,
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add("--part", choices=(*PARTS, "all"), default="all", help="of the study")
    add(
        "--arms",
        nargs="+",
        default=["stock", "radix"],
        metavar="ARM",
        help="as of a replay; stock is always one of them",
    )
    add(
        "--seeds",
        type=partial(number, int, 0, 1_000_000),
        nargs="+",
        default=[0],
        metavar="N",
        help="of loads, and of the points that are drawn",
    )
    add(
        "--points",
        type=whole(0),
        default=48,
        metavar="N",
        help="drawn for each seed, of the part pressure",
    )
    add_run_options(parser, "hybrid", "the tables go", os.cpu_count())
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_radix_bench.replay.checks import check_arms

    arms = list(dict.fromkeys(["stock", *arguments.arms]))
    parts = PARTS if arguments.part == "all" else (arguments.part,)
    cells: list[Cell] = []
    for seed in dict.fromkeys(arguments.seeds):
        cells += traffic_cells(seed) if "traffic" in parts else []
        cells += pressure_cells(seed, arguments.points) if "pressure" in parts else []
    try:
        for layout in dict.fromkeys(cell.layout for cell in cells):
            check_arms(replace(options_of(layout), arms=arms))
    except ValueError as error:
        parser.error(str(error))
    output, csv = outputs(parser, arguments.output, ".csv")
    tasks = [(cell, tuple(arms)) for cell in cells]
    runs = collect(run_cell, tasks, arguments.jobs, output)
    csv.write(csv_text(all_columns(arms), runs))
    _show(runs, parts, arms)
    say_where(console(), "Every run", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


def _show(runs: Sequence[Run], parts: Sequence[str], arms: Sequence[str]) -> None:
    out = console(200)
    titles: dict[str, Any] = {
        "traffic": "Tokens computed, generated ones among them, with room for all",
        "pressure": "Hit rate of sessions over small pools",
    }
    for part in parts:
        mine = [run for run in runs if run["part"] == part]
        print_table(out, titles[part], columns(part, arms), mine)
        for sentence in sentences(mine, arms) if part == "pressure" else ():
            say(out, sentence)


if __name__ == "__main__":
    sys.exit(main())
