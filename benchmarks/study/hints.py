"""What it is worth when clients say that a conversation is over, and when they err.

    python -m vllm_radix_bench.study hints --trace trace.jsonl

One request after the other over the radix tree, without a scheduler, as in the study of
eviction. A conversation is over when no later prompt has the last whole block of its
own. ``none``: nobody says so. ``true``: every client does, at the last answer.
``a third false``: a third of all requests, drawn at random, say the opposite of what is
true.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_radix.exits import ExitCode
from vllm_radix_bench.replay.oracles import farthest_next_use
from vllm_radix_bench.report.cli_types import WithDefaults, whole
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import all_written
from vllm_radix_bench.report.tables import console, print_table, say, say_where
from vllm_radix_bench.study.eviction import DEFAULT, LEARNS, hit_rate
from vllm_radix_bench.study.results import (
    Run,
    add_run_options,
    add_trace_sizes,
    collect,
    outputs,
)
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.encoders import words
from vllm_radix_bench.workloads.eviction_loads import Blocks, from_trace

TOKENS = 500_000, 1_000_000, 2_600_000, 5_000_000
POLICIES = DEFAULT, LEARNS
SAID = "none", "true", "a third false"
FALSE = 1 / 3


@dataclass(frozen=True)
class Cell:
    """A trace and a cache.

    Attributes:
        trace: the file.
        limit: only so many requests of it.
        tokens: of the cache.
        seed: of who errs.
    """

    trace: Path
    limit: int | None
    tokens: int
    seed: int


def truly_over(requests: Sequence[Blocks]) -> set[int]:
    """Return the numbers of the requests with which a conversation ends."""
    last = {
        block: number
        for number, request in enumerate(requests)
        for block in request.prompt
    }
    return {
        number
        for number, request in enumerate(requests)
        if not request.prompt or last[request.prompt[-1]] == number
    }


def with_errors(over: set[int], requests: int, seed: int) -> set[int]:
    """Return who says that it is over, when a third says the opposite of the truth."""
    rng = random.Random(seed)
    wrong = {one for one in range(requests) if rng.random() < FALSE}
    return over ^ wrong


def run_cell(cell: Cell) -> Run:
    """Run both policies on one cell, with and without hints."""
    requests, size = from_trace(load(cell.trace, words, limit=cell.limit))
    blocks = cell.tokens // size
    over = truly_over(requests)
    said = (), over, with_errors(over, len(requests), cell.seed)
    paths = [[*one.prompt, *one.answer] for one in requests]
    best = farthest_next_use(paths, [len(one.prompt) for one in requests], blocks)
    rates = {
        f"{policy}, {name}": hit_rate(requests, size, blocks, policy, who)[0]
        for policy in POLICIES
        for name, who in zip(SAID, said, strict=True)
    }
    tokens = sum(one.prompt_tokens for one in requests)
    return {
        "tokens": cell.tokens,
        "blocks": blocks,
        "block_size": size,
        "requests": len(requests),
        "over": len(over),
        "best": best * size / tokens,
        "hit_rates": rates,
    }


def share_of_gap(run: Run, arm: str) -> float | None:
    """Return how far an arm is from least recently used to the best; 1 is there."""
    before = run["hit_rates"][f"{DEFAULT}, {SAID[0]}"]
    gap = run["best"] - before
    return (run["hit_rates"][arm] - before) / gap if gap > 0.005 else None


def _rate(run: Run, arm: str) -> float:
    return float(run["hit_rates"][arm])


def columns() -> list[Column]:
    """Return the columns; rows are caches."""
    out = [Column("cache, tokens", lambda run: run["tokens"], "{:,}", is_name=True)]
    for policy in POLICIES:
        for name in SAID:
            arm = f"{policy}, {name}"
            out.append(Column(arm, partial(_rate, arm=arm), "{:.2%}"))
            if name == "true":
                way = partial(share_of_gap, arm=arm)
                out.append(Column(f"{arm}: share of the gap", way, "{:.0%}"))
    out.append(Column("best", lambda run: run["best"], "{:.2%}"))
    return out


def sentences(runs: Sequence[Run]) -> list[str]:
    """Return what wrong hints cost each policy, at worst."""
    out = []
    for policy in POLICIES:
        without, _, wrong = (f"{policy}, {name}" for name in SAID)
        points = [100 * (_rate(r, wrong) - _rate(r, without)) for r in runs]
        at = min(range(len(runs)), key=points.__getitem__)
        out.append(
            f"{policy}: with a third of the hints false {points[at]:+.2f} points at "
            f"worst against no hints, at {runs[at]['tokens']:,} tokens"
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.hints",
        description=__doc__,
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="of hash ids")
    add_trace_sizes(parser, TOKENS)
    add("--seed", type=whole(0), default=0, metavar="N", help="of who errs")
    add_run_options(parser, "hints", "the table goes", 1)
    arguments = parser.parse_args(argv)
    try:
        from_trace(load(arguments.trace, words, limit=1))
    except (OSError, ValueError) as error:
        parser.error(f"--trace: {error}")
    output, csv = outputs(parser, arguments.output, ".csv")
    cells = [
        Cell(arguments.trace, arguments.limit, tokens, arguments.seed)
        for tokens in arguments.tokens
    ]
    runs = collect(run_cell, cells, arguments.jobs, output)
    csv.write(csv_text(columns(), runs))
    out = console(200)
    title = "Hit rates, in tokens; best evicts what is needed last, known in advance"
    print_table(out, title, columns(), runs)
    for sentence in sentences(runs):
        say(out, sentence)
    say_where(out, "Every run", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


if __name__ == "__main__":
    sys.exit(main())
