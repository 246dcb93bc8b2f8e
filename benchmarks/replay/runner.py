"""What radix would do to your traffic with your cache: `vllm-radix replay`.

Runs a trace, or a built-in workload, through vLLM's real scheduler without a model,
once for each arm and cache size, on a virtual clock. Tokens, steps, hits and
preemptions are facts; seconds are the cost model's.
"""

import importlib
import inspect
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from statistics import fmean
from typing import Any

import numpy as np
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix import RadixScheduler
from vllm_radix.config import RadixConfig, parse_flag
from vllm_radix.tree import encode
from vllm_radix_bench.replay.oracles import (
    best_eviction,
    every_turn,
    infinite_cache,
    known_in_advance,
)
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.report.progress import Progress, seconds_in_words
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import Outcome, Record, VirtualRun
from vllm_radix_bench.sim.engine import blocks_for, make_scheduler
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.workloads.turn import Turn, longest_path

KNOWN_ARMS = ("stock", "radix", "apc-off")

REQUEST_COLUMNS = (
    "id",
    "tenant",
    "prompt_tokens",
    "cached_tokens",
    "ttft",
    "steps",
    "overtaken",
    "preemptions",
)
"""Of each request's row in a result; see ``sim.driver.Record``."""
_SHORTEST = 1e-9
"""Seconds to a first token that the clock, late in a long trace, may show as 0."""
_OVERLOADED, _EARLY, _FEW = 0.1, 0.9, 20
"""Share of the requests sent in the early part of a run that still wait at its end,
above which a load is too high; that part; and the fewest that say something."""


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


@dataclass
class Arm:
    """A scheduler to run.

    Attributes:
        name: as it was given.
        cls: class of the scheduler.
        radix: options of radix.
        caching: whether prefix caching is on.
    """

    name: str
    cls: Callable[..., Any]
    radix: dict[str, Any] = field(default_factory=dict)
    caching: bool = True


def radix_arm(name: str, options: Mapping[str, Any]) -> Arm:
    """Return an arm of radix.

    Raises:
        ValueError: an option is wrong.
    """
    return Arm(name, RadixScheduler, RadixConfig.resolve(options).to_dict())


def best_order() -> Arm:
    """Return the arm that runs all requests in the best order, known in advance."""
    return Arm("", RadixScheduler, {"policy": "fcfs"})


def parse_arm(text: str) -> Arm:
    """Return an arm: a known one, ``radix:{JSON}``, or ``module.Class``.

    Raises:
        InputError: it is none of these.
    """
    if text == "stock":
        return Arm(text, Scheduler)
    if text == "apc-off":
        return Arm(text, Scheduler, caching=False)
    name, _, options = text.partition(":")
    if name == "radix":
        try:
            return radix_arm(text, parse_flag(options))
        except ValueError as error:
            raise InputError(f"--arms: {text!r}: {error}") from error
    module, _, attribute = text.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    # Of the user's own module, whatever it is; some end the program.
    except (Exception, SystemExit):
        found = None
    if (
        not isinstance(found, type)
        or not issubclass(found, SchedulerInterface)
        or inspect.isabstract(found)
    ):
        raise InputError(
            f"--arms: {text!r} is none of {', '.join(KNOWN_ARMS)}, "
            "radix:{JSON options}, or the qualified name of a scheduler class "
            "that is not abstract"
        )
    return Arm(text, found)


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

    What it can is measured: all roots at once, in the first cache.
    """
    longest = longest_path(roots)
    outcome = run_arm(parse_arm("stock"), roots, options.blocks[0], options, longest)
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
    return VirtualRun(scheduler, options.cost, answers, progress).run(roots)


def scheduler_of(arm: Arm, blocks: int, options: Options, longest: int) -> Any:
    """Return a fresh scheduler of an arm.

    Raises:
        ValueError: it does not serve the layout.
    """
    extra: dict[str, Any] = {}
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


def check_layout(options: Options) -> None:
    """Refuse a layout that an arm does not serve.

    Raises:
        InputError: one does not; the message is its own.
    """
    layout = options.parsed_layout()
    if layout is None:
        return
    try:
        layout.at(options.block_size)
    except ValueError as error:
        raise InputError(f"--layout: {error}") from error
    arms = [(f"--arms: {name!r}", parse_arm(name)) for name in options.arms]
    if options.known_in_advance:
        skip = "the best order (--no-oracle skips it)"
        arms.append((skip, best_order()))
    for name, arm in arms:
        try:
            # Of any size: nothing is run.
            scheduler_of(arm, 16, options, options.max_num_batched_tokens)
        except ValueError as error:
            where = f"{name} with the layout {options.layout}"
            raise InputError(f"{where}: {error}") from error


def jain(values: Sequence[float]) -> float:
    """Return Jain's fairness index of what each gets: 1 is fair, 1/n is not."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def latencies(records: Sequence[Record]) -> dict[str, float]:
    """Return mean, percentiles and maximum of the times to first token."""
    ttfts = np.array([record.ttft for record in records])
    out = {"mean": float(ttfts.mean())}
    for share in (50, 90, 99):
        out[f"p{share}"] = float(np.percentile(ttfts, share))
    out["max"] = float(ttfts.max())
    return out


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return what a run did, as one dict; the same input gives the same."""
    records = outcome.records
    prompt_tokens = sum(record.prompt_tokens for record in records)
    tenants: dict[str, list[Record]] = {}
    for record in records:
        tenants.setdefault(record.tenant, []).append(record)
    by_tenant = {name: latencies(mine) for name, mine in sorted(tenants.items())}
    return {
        "requests": len(records),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(record.cached_tokens for record in records),
        "hit_rate": sum(r.cached_tokens for r in records) / prompt_tokens,
        "computed_prompt_tokens": outcome.computed_prompt_tokens,
        "engine_steps": outcome.engine_steps,
        "preemptions": sum(record.preemptions for record in records),
        "seconds": outcome.seconds,
        "requests_per_second": len(records) / outcome.seconds,
        "ttft": latencies(records),
        "latency_mean": fmean(record.finished - record.sent for record in records),
        "overtaken_most": max(record.overtaken for record in records),
        "jain": jain([1 / max(lat["mean"], _SHORTEST) for lat in by_tenant.values()]),
        "tenants": by_tenant if len(by_tenant) > 1 else {},
    }


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


def last_arrival(roots: Sequence[Turn]) -> float:
    """Return when the last root is sent, in seconds after the first."""
    return max(root.arrival for root in roots)


def is_overloaded(roots: Sequence[Turn], outcome: Outcome) -> bool:
    """Return whether requests came faster than they could be served.

    Then many of the roots that were sent well before the last one still have no first
    token when that one is sent. Never so when all are sent at once, or few are sent.
    """
    last = last_arrival(roots)
    early = [r for r in outcome.records if "." not in r.id and r.sent < _EARLY * last]
    waiting = sum(record.first_token > last for record in early)
    return len(early) >= _FEW and waiting >= _OVERLOADED * len(early)


def request_rows(outcome: Outcome) -> list[list[Any]]:
    """Return what became of each request; see ``REQUEST_COLUMNS``."""
    return [
        [
            record.id,
            record.tenant,
            record.prompt_tokens,
            record.cached_tokens,
            round(record.ttft, 6),
            record.steps,
            record.overtaken,
            record.preemptions,
        ]
        for record in outcome.records
    ]


def fingerprint(roots: Sequence[Turn]) -> str:
    """Return a text that is another for other requests."""
    found = sha256()
    for name, turn, prompt in every_turn(roots):
        sent = (turn.arrival, turn.delay, turn.whole, turn.priority)
        said = (name, len(prompt), turn.max_tokens, turn.tenant, turn.salt, *sent)
        found.update(repr(said).encode())
        found.update(encode(turn.tokens))
    return found.hexdigest()[:16]


def new_result(roots: Sequence[Turn], options: Options) -> dict[str, Any]:
    """Return a result without runs, ready for JSON."""
    return {
        "versions": {name: version(name) for name in ("vllm", "vllm-radix")},
        # Options of arms come from the environment, too.
        "options": {
            **asdict(options),
            "arm_options": {name: parse_arm(name).radix for name in options.arms},
        },
        "infinite_cache": infinite_cache(roots),
        "last_arrival": last_arrival(roots),
        "request_columns": list(REQUEST_COLUMNS),
        "cells": [
            {"blocks": blocks, "arms": {}, "requests": {}} for blocks in options.blocks
        ],
        "machine": {"scheduler_cpu_seconds_per_request": [{} for _ in options.blocks]},
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
        what = f"{name or 'known in advance'}, {blocks:,} blocks"
        progress.begin(what)
        start = time.perf_counter()
        if name is None:
            flat, answers = known_in_advance(roots)
            best = best_order()
            # All are there at once: priorities would undo the order.
            plain = replace(options, priorities=False)
            outcome = run_arm(
                best, flat, blocks, plain, longest, progress.advance, answers
            )
            cell["known_in_advance"] = outcome.computed_prompt_tokens
        else:
            arm = parse_arm(name)
            outcome = run_arm(arm, roots, blocks, options, longest, progress.advance)
            overloaded = is_overloaded(roots, outcome)
            made = {**summary(outcome), "overloaded": overloaded}
            if options.known_in_advance and options.layout is None:
                order = [r.id for r in sorted(outcome.records, key=lambda r: r.sent)]
                best = best_eviction(roots, order, blocks, options.block_size)
                made["hit_rate_best_eviction"] = best / made["prompt_tokens"]
            cell["arms"][name] = made
            cell["requests"][name] = request_rows(outcome)
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
    return len(options.blocks) * (len(options.arms) + options.known_in_advance)
