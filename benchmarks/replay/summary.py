"""What a run did, as numbers for a result."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

import numpy as np

from vllm_radix_bench.sim.driver import FleetOutcome
from vllm_radix_bench.sim.virtual_engine import Outcome, Record
from vllm_radix_bench.workloads.turn import Turn

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
"""Of each request's row in a result; see ``sim.virtual_engine.Record``."""
ENGINE_COLUMN = "engine"
"""One more, where there are several engines."""
_MOST_SAMPLES = 100
_SHORTEST = 1e-9
"""Seconds to a first token that the clock, late in a long trace, may show as 0."""
_OVERLOADED, _EARLY, _FEW = 0.1, 0.9, 20
"""Share of the requests sent in the early part of a run that still wait at its end,
above which a load is too high; that part; and the fewest that say something."""


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
    several = fleet_summary(outcome) if isinstance(outcome, FleetOutcome) else {}
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
        **several,
    }


def fleet_summary(outcome: FleetOutcome) -> dict[str, Any]:
    """Return what each engine did, and how much more than the mean the busiest did."""
    engines = [
        {
            "requests": len(one.records),
            "prompt_tokens": sum(record.prompt_tokens for record in one.records),
            "computed_prompt_tokens": one.computed_prompt_tokens,
            "engine_steps": one.engine_steps,
            "seconds": one.seconds,
        }
        for one in outcome.engines
    ]

    def imbalance(name: str) -> float:
        numbers = [one[name] for one in engines]
        return max(numbers) / fmean(numbers)

    return {
        "engines": engines,
        "imbalance": {
            "requests": imbalance("requests"),
            "tokens": imbalance("computed_prompt_tokens"),
        },
    }


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
    several = isinstance(outcome, FleetOutcome)
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
            *([record.engine] if several else []),
        ]
        for record in outcome.records
    ]


def hit_rates(outcome: Outcome) -> list[list[float]]:
    """Return seconds and the hit rate until then, at some first tokens, at most 100."""
    records = sorted(outcome.records, key=lambda record: record.first_token)
    prompts = list(accumulate(record.prompt_tokens for record in records))
    cached = list(accumulate(record.cached_tokens for record in records))
    chosen = {round(i) for i in np.linspace(0, len(records) - 1, _MOST_SAMPLES)}
    return [
        [round(records[i].first_token, 6), round(cached[i] / prompts[i], 6)]
        for i in sorted(chosen)
    ]
