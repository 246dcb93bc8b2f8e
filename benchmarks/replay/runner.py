"""What radix would do to your traffic with your cache: `vllm-radix replay`.

Runs a trace, or a built-in workload, through vLLM's real scheduler without a model,
once for each arm and cache size, on a virtual clock. Tokens, steps, hits and
preemptions are facts; seconds are the cost model's.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from vllm.config import KVEventsConfig

from vllm_radix.tree import encode
from vllm_radix_bench.replay.arms import Arm, best_order, parse_arm
from vllm_radix_bench.replay.cache_keys import Shared, keys_of, sharing_most
from vllm_radix_bench.replay.oracles import (
    best_eviction,
    every_turn,
    known_in_advance,
)
from vllm_radix_bench.replay.summary import (
    ENGINE_COLUMN,
    REQUEST_COLUMNS,
    hit_rates,
    is_overloaded,
    last_arrival,
    request_rows,
    summary,
)
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.report.progress import Progress, seconds_in_words
from vllm_radix_bench.routing import ROUTINGS, RoutingChoice, parse_routing
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import FleetOutcome, FleetRun, VirtualRun
from vllm_radix_bench.sim.engine import blocks_for, make_scheduler
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.sim.virtual_engine import Outcome
from vllm_radix_bench.workloads.turn import Turn, longest_path


@dataclass
class Options:
    """What ``vllm-radix replay`` can be told; see its ``--help``."""

    blocks: list[int]
    arms: list[str] = field(default_factory=lambda: ["stock", "radix"])
    block_size: int = 16
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    long_prefill_token_threshold: int = 0
    priorities: bool = False
    cost: CostModel = field(default_factory=CostModel)
    known_in_advance: bool = True
    layout: str | None = None
    bytes_per_block: float | None = None
    engines: int | None = None
    routings: list[str] = field(default_factory=list)

    def dense_cache(self) -> tuple[int, int]:
        """Return blocks and block size of the first cache for what keeps all tokens.

        What has a window or a state is left out: at long prompts it needs little.
        """
        layout = self.parsed_layout()
        if layout is None:
            return self.blocks[0], self.block_size
        blocks = max(1, self.blocks[0] // layout.dense_groups)
        return blocks, layout.dense_block_size(self.block_size)

    def parsed_layout(self) -> Layout | None:
        """Return the layout; None is one group of full attention.

        Raises:
            ValueError: the text names none.
        """
        return None if self.layout is None else Layout.parse(self.layout)

    def key_block_size(self) -> int:
        """Return in how many tokens prefixes are counted: 1 with several groups."""
        layout = self.parsed_layout()
        if layout is None:
            return self.block_size
        groups = layout.at(self.block_size).groups
        is_full = len(groups) == 1 and groups[0].kind == "full"
        return groups[0].block_size if is_full else 1

    def shared_most(self, roots: Sequence[Turn]) -> Shared:
        """Return what salts share in the arm that could compute the fewest tokens."""
        values = [parse_arm(arm).public_prefix for arm in self.arms]
        return sharing_most(roots, values, self.key_block_size())


def send_at_rate(roots: Sequence[Turn], rate: float, seed: int) -> None:
    """Give roots the arrival times of a Poisson process, in shuffled order.

    Args:
        roots: sent in this order; times are written into them.
        rate: roots a second.
        seed: of times.
    """
    rng = random.Random(f"arrivals {seed}")
    now = 0.0
    for root in roots:
        now += rng.expovariate(rate)
        root.arrival = now


def shuffle(roots: list[Turn], seed: int) -> None:
    """Put roots in an order of no meaning, as requests of many users come."""
    random.Random(f"order {seed}").shuffle(roots)


def send_at_load(
    roots: Sequence[Turn], load: float, seed: int, options: Options
) -> None:
    """Give roots Poisson arrivals at a multiple of what stock can serve.

    What it can is measured: all roots at once, in the first cache; several engines get
    them in turn.
    """
    longest = longest_path(roots)
    stock, blocks = parse_arm("stock"), options.blocks[0]
    outcome: Outcome
    if options.engines is None:
        outcome = run_arm(stock, roots, blocks, options, longest)
    else:
        in_turn = parse_routing(next(iter(ROUTINGS)))
        outcome = run_fleet(stock, roots, blocks, options, longest, in_turn)
    send_at_rate(roots, load * len(roots) / outcome.seconds, seed)


def run_arm(
    arm: Arm,
    roots: Sequence[Turn],
    blocks: int,
    options: Options,
    longest: int,
    progress: Callable[[int], None] | None = None,
    answers: dict[str, list[int]] | None = None,
) -> Outcome:
    """Run all requests on one arm."""
    scheduler = scheduler_of(arm, blocks, options, longest)
    outcome = VirtualRun(scheduler, options.cost, answers, progress).run(roots)
    scheduler.shutdown()
    return outcome


def run_fleet(
    arm: Arm,
    roots: Sequence[Turn],
    blocks: int,
    options: Options,
    longest: int,
    routing: RoutingChoice,
    progress: Callable[[int], None] | None = None,
) -> FleetOutcome:
    """Run all requests on several engines of one arm, each with its own cache."""
    assert options.engines is not None
    rule = routing.make(options.engines)
    schedulers = [
        scheduler_of(arm, blocks, options, longest, rule.wants_events)
        for _ in range(options.engines)
    ]
    run = FleetRun(schedulers, options.cost, rule, progress=progress)
    outcome = run.run(roots)
    for scheduler in schedulers:
        scheduler.shutdown()
    return outcome


def scheduler_of(
    arm: Arm, blocks: int, options: Options, longest: int, kv_events: bool = False
) -> Any:
    """Return a fresh scheduler of an arm.

    Args:
        arm: of the scheduler.
        blocks: of its cache.
        options: of the run.
        longest: request, in tokens.
        kv_events: whether it tells what it caches; without a cache there is nothing.

    Raises:
        ValueError: it does not serve the layout.
    """
    extra: dict[str, Any] = {}
    if kv_events and arm.caching:
        extra["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True, publisher="null"
        )
    if options.priorities:
        extra["scheduling_policy"] = "priority"
    return make_scheduler(
        arm.cls,
        block_size=options.block_size,
        layout=options.parsed_layout(),
        # One block is vLLM's own, the null block.
        num_blocks=blocks + 1,
        radix=arm.radix,
        max_model_len=longest + 1,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        # No chunk is longer than a prompt; vLLM refuses more.
        long_prefill_token_threshold=min(options.long_prefill_token_threshold, longest),
        enable_prefix_caching=arm.caching,
        **extra,
    )


def check(roots: Sequence[Turn], options: Options) -> int:
    """Return the tokens of the longest request.

    Raises:
        InputError: it does not fit a cache.
    """
    longest = longest_path(roots)
    layout = options.parsed_layout()
    if layout is not None:
        least = blocks_for(
            layout, options.block_size, longest + 1, options.max_num_batched_tokens
        )
        for blocks in options.blocks:
            if blocks < least:
                raise InputError(
                    f"--blocks: a request of {longest} tokens needs {least} blocks "
                    f"in the layout {layout}, and a cache has {blocks}"
                )
        return longest
    for blocks in options.blocks:
        if longest > blocks * options.block_size:
            raise InputError(
                f"--blocks: a request of {longest} tokens does not fit a cache of "
                f"{blocks} blocks of {options.block_size} tokens"
            )
    return longest


def fingerprint(roots: Sequence[Turn]) -> str:
    """Return a text that is another for other requests."""
    found = sha256()
    for name, turn, prompt in every_turn(roots):
        sent = (turn.arrival, turn.delay, turn.whole, turn.priority)
        hints = sorted(turn.hints.items())
        said = (name, len(prompt), turn.max_tokens, turn.tenant, turn.salt, *sent)
        found.update(repr((*said, *hints)).encode())
        found.update(encode(turn.tokens))
        found.update(encode(turn.answer or ()))
    return found.hexdigest()[:16]


def new_result(roots: Sequence[Turn], options: Options) -> dict[str, Any]:
    """Return a result without runs, ready for JSON.

    It has a cell for each cache, with several engines for each cache and routing rule.
    """
    cells = [
        {
            "blocks": blocks,
            **routed,
            "arms": {},
            "requests": {},
            "hit_rate_over_time": {},
        }
        for blocks in options.blocks
        for routed in ([{"routing": one} for one in options.routings] or [{}])
    ]
    return {
        "versions": {name: version(name) for name in ("vllm", "vllm-radix")},
        # Options of arms come from the environment, too.
        "options": {
            **asdict(options),
            "arm_options": {name: parse_arm(name).radix for name in options.arms},
        },
        "infinite_cache": options.shared_most(roots).fewest,
        "last_arrival": last_arrival(roots),
        "request_columns": [
            *REQUEST_COLUMNS,
            *([] if options.engines is None else [ENGINE_COLUMN]),
        ],
        "cells": cells,
        "machine": {
            "scheduler_cpu_seconds_per_request": [{} for _ in cells],
            **(
                {}
                if options.engines is None
                else {"routing_cpu_seconds_per_request": [{} for _ in cells]}
            ),
        },
    }


def plan(options: Options, result: dict[str, Any]) -> list[tuple[int, str | None]]:
    """Return the runs that a result lacks: number of the cell, and arm.

    An arm None stands for the run of all requests in the best order.
    """
    pieces: list[tuple[int, str | None]] = []
    for number, cell in enumerate(result["cells"]):
        pieces += [(number, arm) for arm in options.arms if arm not in cell["arms"]]
        if options.known_in_advance and "known_in_advance" not in cell:
            pieces.append((number, None))
    return pieces


def run(
    roots: Sequence[Turn],
    options: Options,
    result: dict[str, Any],
    pieces: Sequence[tuple[int, str | None]],
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Run arms and put what they did into a result.

    Args:
        roots: the requests.
        options: what to run.
        result: to complete; see ``new_result``. Only its ``machine`` depends on more
            than the input.
        pieces: what it lacks; see ``plan``.
        progress: told of each run, and of the requests done in it.
        save: called after each run.

    Raises:
        InputError: a request does not fit a cache.
        StalledError: a scheduler stopped.
    """
    longest = check(roots, options)
    begun = time.perf_counter()
    for done, (number, name) in enumerate(pieces, 1):
        cell = result["cells"][number]
        blocks = cell["blocks"]
        routed = cell.get("routing")
        what = "" if routed is None else f"{routed}, "
        what += f"{name or 'known in advance'}, {blocks:,} blocks"
        progress.begin(what)
        start = time.perf_counter()
        if name is None:
            shared = options.shared_most(roots)
            flat, answers = known_in_advance(roots, shared.keys)
            best = best_order(shared.public_prefix)
            # All are there at once: priorities would undo the order.
            plain = replace(options, priorities=False)
            outcome = run_arm(
                best, flat, blocks, plain, longest, progress.advance, answers
            )
            cell["known_in_advance"] = outcome.computed_prompt_tokens
        else:
            arm = parse_arm(name)
            advance = progress.advance
            if routed is None:
                outcome = run_arm(arm, roots, blocks, options, longest, advance)
            else:
                rule = parse_routing(routed)
                fleet = run_fleet(arm, roots, blocks, options, longest, rule, advance)
                outcome = fleet
                used = result["machine"]["routing_cpu_seconds_per_request"][number]
                used[name] = fleet.routing_cpu / len(fleet.records)
            made = {**summary(outcome), "overloaded": is_overloaded(roots, outcome)}
            if options.known_in_advance and options.layout is None:
                order = [r.id for r in sorted(outcome.records, key=lambda r: r.sent)]
                size = options.block_size
                keys = keys_of(arm.public_prefix, size)
                best = best_eviction(roots, order, blocks, size, keys)
                made["hit_rate_best_eviction"] = best / made["prompt_tokens"]
            cell["arms"][name] = made
            cell["requests"][name] = request_rows(outcome)
            cell["hit_rate_over_time"][name] = hit_rates(outcome)
            used = result["machine"]["scheduler_cpu_seconds_per_request"][number]
            used[name] = outcome.scheduler_cpu / len(outcome.records)
        save()
        now = time.perf_counter()
        left = (now - begun) / done * (len(pieces) - done)
        progress.finish(
            f"{what}: {outcome.engine_steps:,} engine steps in "
            f"{seconds_in_words(now - start)}",
            f"about {seconds_in_words(left)} to go" if left else "",
        )


def total_pieces(options: Options) -> int:
    """Return how many runs there are."""
    cells = len(options.blocks) * max(1, len(options.routings))
    return cells * (len(options.arms) + options.known_in_advance)
