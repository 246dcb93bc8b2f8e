"""Eviction policies against least recently used, and against the best there is.

    python -m vllm_radix_bench.study eviction --trace trace.jsonl

Sequential: requests one after the other over the radix tree, without a scheduler, on
generated loads and on a trace with hash ids; hit rates are facts. The best there is
evicts what is needed last, known in advance. Concurrent, with ``--concurrent``: the
trace through vLLM's scheduler on a virtual clock, as ``vllm-radix replay`` does.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_radix.exits import ExitCode
from vllm_radix.tree import POLICIES, RadixTree, encode
from vllm_radix.tree.eviction import HitDensity
from vllm_radix.tree.eviction.hit_density import BUCKETS, class_name
from vllm_radix_bench.replay.oracles import farthest_next_use
from vllm_radix_bench.report.cli_types import WithDefaults, number, whole
from vllm_radix_bench.report.columns import Column, csv_text
from vllm_radix_bench.report.output import all_written
from vllm_radix_bench.report.tables import console, print_table, say, say_where
from vllm_radix_bench.study.results import (
    LOAD,
    Run,
    add_run_options,
    add_trace_sizes,
    collect,
    outputs,
)
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.encoders import words
from vllm_radix_bench.workloads.eviction_loads import (
    BLOCK_SIZE,
    LOADS,
    Blocks,
    draw,
    from_trace,
)
from vllm_radix_bench.workloads.turn import longest_path

SHARES = 0.03, 0.1, 0.3, 0.7
"""Caches of generated loads: shares of all blocks that are ever used."""
TRACE_TOKENS = 500_000, 1_000_000, 2_600_000, 5_000_000, 10_000_000
TRACE = "trace"
DEFAULT = "lru"
LEARNS = "hit-density"
MARGIN = 0.2
"""Points of the hit rate by which a policy may be behind, at most."""


@dataclass(frozen=True)
class Cell:
    """A load and a cache.

    Attributes:
        load: a key of ``LOADS``, or ``TRACE``.
        seed: of a generated load.
        requests: how many.
        share: blocks of the cache, as a share of those used; of a generated load.
        tokens: of the cache, for a trace.
        trace: the file.
        concurrent: through the scheduler, and at which speed-up of the trace.
    """

    load: str
    seed: int
    requests: int | None
    share: float = 0.0
    tokens: int = 0
    trace: Path | None = None
    concurrent: float = 0.0

    def made(self) -> tuple[list[Blocks], int, int]:
        """Return requests, tokens of a block, and blocks of the cache."""
        if self.trace is not None:
            roots = load(self.trace, words, limit=self.requests)
            requests, size = from_trace(roots)
            return requests, size, self.tokens // size
        requests = draw(self.load, self.seed, self.requests or 1)
        used = {block for one in requests for block in (*one.prompt, *one.answer)}
        largest = max(len(one.prompt) + len(one.answer) for one in requests)
        return requests, BLOCK_SIZE, max(2 * largest, int(self.share * len(used)))


def hit_rate(
    requests: Sequence[Blocks],
    size: int,
    blocks: int,
    policy: str,
    over: Collection[int] = (),
) -> tuple[float, RadixTree]:
    """Return the share of prompt tokens that are found, and the tree at the end.

    Args:
        requests: served one after the other.
        size: tokens of a block.
        blocks: of the cache.
        policy: of eviction.
        over: numbers of requests whose clients say that their session is over.
    """
    # An id stands for a block: the tree of ids is the tree of tokens.
    tree = RadixTree(1, POLICIES[policy]())
    blank = list(range(blocks))
    hits = asked = 0
    for at, request in enumerate(requests):
        prompt, answer, prompt_tokens, output_tokens = request
        path = [*prompt, *answer]
        key = encode(path)
        found = list(tree.match(key, limit=len(prompt)).blocks)
        hits += len(found) * size
        asked += prompt_tokens
        last = found[-1] if found else -1
        use = tree.note_use(encode(prompt), None, last, len(found))
        if found:
            tree.note_parting(last)
        tree.acquire(found)
        need = len(path) - len(found)
        if need > len(blank):
            blank += tree.evict(need - len(blank))
        held = found + blank[:need]
        blank = blank[need:]
        blank += tree.insert(key, held, start=len(found))
        new = prompt_tokens - use.seen * size if use is not None else 0
        tree.note_end(held, use, output_tokens, new)
        blank += tree.release(held[::-1])
        if at in over and held:
            end, depth = tree.path_end(len(held), held.__getitem__)
            tree.let_go(end, depth - 1)
    return hits / asked, tree


def densities(policy: HitDensity) -> list[dict[str, Any]]:
    """Return what was learned of each class that was seen."""
    out = []
    for label in range(policy.num_classes):
        at = slice(label * BUCKETS, (label + 1) * BUCKETS)
        hits, ends = list(policy.hits[at]), list(policy.ends[at])
        if sum(hits) + sum(ends) >= 1:
            curve = [policy.density(label, 4 << step) for step in range(BUCKETS)]
            out.append(
                {
                    "class": class_name(label),
                    "hits": [round(x, 1) for x in hits],
                    "ends": [round(x, 1) for x in ends],
                    "density_at_4_8_16_releases": [float(f"{x:.3g}") for x in curve],
                }
            )
    return out


def run_cell(task: tuple[Cell, tuple[str, ...]]) -> Run:
    """Run some policies on one cell.

    Args:
        task: the cell, and the policies.
    """
    cell, policies = task
    requests, size, blocks = cell.made()
    paths = [[*one.prompt, *one.answer] for one in requests]
    best = farthest_next_use(paths, [len(one.prompt) for one in requests], blocks)
    tokens = sum(one.prompt_tokens for one in requests)
    out: Run = {
        "load": cell.load,
        "seed": cell.seed,
        "requests": len(requests),
        "block_size": size,
        "blocks": blocks,
        "concurrent": cell.concurrent,
        "best": best * size / tokens,
        "hit_rates": {},
        "ttft": {},
    }
    for policy in policies:
        if cell.concurrent:
            out["hit_rates"][policy], out["ttft"][policy] = _replayed(
                cell, size, blocks, policy
            )
            continue
        rate, tree = hit_rate(requests, size, blocks, policy)
        out["hit_rates"][policy] = rate
        if isinstance(tree.policy, HitDensity):
            out["guarded"] = tree.policy.guarded
            out["classes"] = densities(tree.policy)
    return out


def _replayed(
    cell: Cell, size: int, blocks: int, policy: str
) -> tuple[float, dict[str, float]]:
    """Return the hit rate and the times to the first token of a replay."""
    from vllm_radix_bench.replay import runner as replay
    from vllm_radix_bench.replay.arms import radix_arm
    from vllm_radix_bench.replay.summary import summary

    assert cell.trace is not None
    roots = load(cell.trace, words, limit=cell.requests, rate=cell.concurrent)
    options = replay.Options([blocks], block_size=size, known_in_advance=False)
    arm = radix_arm(policy, {"eviction": policy})
    outcome = replay.run_arm(arm, roots, blocks, options, longest_path(roots))
    made = summary(outcome)
    return made["hit_rate"], made["ttft"]


def share_of_gap(run: Run, policy: str) -> float | None:
    """Return how far a policy is from least recently used to the best; 1 is there."""
    rates = run["hit_rates"]
    gap = run["best"] - rates[DEFAULT]
    return (rates[policy] - rates[DEFAULT]) / gap if gap > 0.005 else None


def columns(policies: Sequence[str]) -> list[Column]:
    """Return the columns; rows are runs."""
    out = [
        Column(LOAD.title, lambda run: run["load"], is_name=True),
        Column("cache, blocks", lambda run: run["blocks"], "{:,}"),
        Column("of tokens", lambda run: run["block_size"], "{:d}"),
    ]
    for policy in policies:
        rate = partial(_rate, policy=policy)
        out.append(Column(policy, rate, "{:.2%}"))
    out.append(Column("best", lambda run: run["best"], "{:.2%}"))
    if LEARNS in policies:
        way = partial(share_of_gap, policy=LEARNS)
        out.append(Column(f"{LEARNS}: share of the gap", way, "{:.0%}"))
    return out


def _rate(run: Run, policy: str) -> float:
    return float(run["hit_rates"][policy])


def sentences(runs: Sequence[Run], policies: Sequence[str]) -> list[str]:
    """Return where each policy is worst against least recently used."""
    out = []
    for policy in policies:
        if policy == DEFAULT:
            continue
        points = [100 * (_rate(r, policy) - _rate(r, DEFAULT)) for r in runs]
        worst = min(range(len(runs)), key=points.__getitem__)
        below = sum(point < -MARGIN for point in points)
        out.append(
            f"{policy}: {points[worst]:+.2f} points at worst ({runs[worst]['load']}, "
            f"{runs[worst]['blocks']:,} blocks), {max(points):+.2f} at best; more than "
            f"{MARGIN} points below {DEFAULT} at {below} of {len(runs)} points"
        )
    return out


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that are asked for."""
    trace, limit = arguments.trace, arguments.limit
    if arguments.concurrent:
        return [
            Cell(TRACE, 0, limit, tokens=size, trace=trace, concurrent=arguments.rate)
            for size in arguments.tokens
        ]
    out = [
        Cell(name, seed, arguments.requests, share)
        for name in arguments.loads
        for seed in arguments.seeds
        for share in SHARES
    ]
    if trace is not None:
        out += [Cell(TRACE, 0, limit, tokens=n, trace=trace) for n in arguments.tokens]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.study.eviction",
        description=__doc__,
        formatter_class=WithDefaults,
    )
    add = parser.add_argument
    add("--loads", nargs="*", default=list(LOADS), choices=list(LOADS), metavar="NAME")
    add("--seeds", type=whole(0), nargs="+", default=[0], metavar="N", help="of loads")
    add("--requests", type=whole(100), default=4000, metavar="N", help="of a load")
    add("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    add("--trace", type=Path, metavar="FILE", help="of hash ids, as Mooncake's")
    add_trace_sizes(parser, TRACE_TOKENS)
    add("--concurrent", action="store_true", help="the trace, through the scheduler")
    add(
        "--rate",
        type=partial(number, float, 0.01, 100),
        default=0.5,
        metavar="X",
        help="speed-up of the trace, if concurrent",
    )
    add_run_options(parser, "eviction", "the table goes", os.cpu_count())
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if arguments.concurrent and arguments.trace is None:
        parser.error("--concurrent: needs --trace, the requests to send")
    policies = list(dict.fromkeys([DEFAULT, *arguments.policies]))
    cells = cells_of(arguments)
    if not cells:
        parser.error("--loads: name one, or give --trace")
    if arguments.trace is not None:
        try:
            from_trace(load(arguments.trace, words, limit=1))
        except (OSError, ValueError) as error:
            parser.error(f"--trace: {error}")
    output, csv = outputs(parser, arguments.output, ".csv")
    tasks = [(cell, tuple(policies)) for cell in cells]
    runs = collect(run_cell, tasks, arguments.jobs, output)
    csv.write(csv_text(columns(policies), runs))
    out = console(200)
    title = "Hit rates, in tokens; best evicts what is needed last, known in advance"
    print_table(out, title, columns(policies), runs)
    for sentence in sentences(runs, policies):
        say(out, sentence)
    say_where(out, "Every run", output, csv)
    return ExitCode.GOOD if all_written(output, csv) else ExitCode.OUTPUT


if __name__ == "__main__":
    sys.exit(main())
