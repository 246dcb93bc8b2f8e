"""Figures of runs, and how sure they are: ratios with their intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = dict[str, Any]

LEAST_ROUNDS = 5
"""Rounds below which no interval is told."""
RATIO_ROUNDS = 3
"""Rounds below which a ratio of times is one drift of the machine away from any other:
none is shown or quoted."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure of a run.

    Attributes:
        name: in reports and for ``--fail-on``.
        unit: of it.
        better: ``lower`` or ``higher``.
        of: takes a run and returns it; None where the run has none.
    """

    name: str
    unit: str
    better: str
    of: Callable[[Run], float | None]


def _quantile(field: str, share: float) -> Callable[[Run], float | None]:
    def take(run: Run) -> float | None:
        values = run[field]
        return float(np.quantile(values, share)) if values else None

    return take


def _mean(field: str) -> Callable[[Run], float | None]:
    return lambda run: float(np.mean(run[field])) if run[field] else None


def _of_times(field: str) -> list[Figure]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    figures = [Figure(f"{field}_mean", "s", "lower", _mean(field))]
    for name, share in shares.items():
        figures.append(Figure(f"{field}_{name}", "s", "lower", _quantile(field, share)))
    return figures


def _a_second(count: Callable[[Run], float]) -> Callable[[Run], float | None]:
    return lambda run: count(run) / run["seconds"] if run["seconds"] else None


TIMES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        *_of_times("ttft"),
        *_of_times("tpot"),
        *_of_times("e2e"),
        Figure(
            "throughput", "requests/s", "higher", _a_second(lambda run: len(run["e2e"]))
        ),
        Figure(
            "output_throughput",
            "tokens/s",
            "higher",
            _a_second(lambda run: run["counts"]["generated_tokens"]),
        ),
    )
}
"""Figures that take the clock, by name."""


def _counted(name: str) -> Callable[[Run], float | None]:
    return lambda run: run["counts"][name]


COUNTS: dict[str, Figure] = {
    name: Figure(name, unit, better, _counted(name))
    for name, unit, better in (
        ("prompt_tokens", "tokens", "lower"),
        ("cached_tokens", "tokens", "higher"),
        ("computed_tokens", "tokens", "lower"),
        ("generated_tokens", "tokens", "higher"),
        ("hit_rate", "", "higher"),
        ("preemptions", "", "lower"),
        ("errors", "requests", "lower"),
    )
}
"""Figures that servers count, by name."""


def ratio(stock: float, radix: float) -> float | None:
    """Return radix over stock; 1 for two zeros, None where stock alone is zero."""
    if stock:
        return radix / stock
    return 1.0 if not radix else None


def interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """Return the bounds of a confidence interval of the ratio of paired rounds.

    Student's interval of the mean of the logarithms of the pairs' ratios: the paired
    difference of two arms. A percentile bootstrap of so few rounds is too narrow: of
    five it covers the truth in 85 of 100 cases where it says 95. None below
    ``LEAST_ROUNDS``, where so few values say nothing of their spread.
    """
    if len(ratios) < LEAST_ROUNDS or min(ratios) <= 0:
        return None
    from scipy.stats import t

    logs = np.log(ratios)
    spread = float(logs.std(ddof=1)) / len(logs) ** 0.5
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * spread
    mean = float(logs.mean())
    return float(np.exp(mean - reach)), float(np.exp(mean + reach))


def compare(figure: Figure, rounds: Sequence[dict[str, Run]]) -> dict[str, Any] | None:
    """Return a figure of both arms over paired rounds; None where a run has none.

    The figures of the arms are their medians over rounds, the ratio is the geometric
    mean of those of the pairs; None below ``RATIO_ROUNDS``.
    """
    pairs = [(figure.of(one["stock"]), figure.of(one["radix"])) for one in rounds]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    found = [ratio(a, b) for a, b in known]
    ratios = [one for one in found if one]
    bounds = interval(ratios) if len(ratios) == len(found) else None
    mean = None
    if len(ratios) >= RATIO_ROUNDS:
        mean = float(np.exp(np.mean(np.log(ratios))))
    return {
        "unit": figure.unit,
        "better": figure.better,
        "stock": float(np.median([a for a, _ in known])),
        "radix": float(np.median([b for _, b in known])),
        "ratio": mean,
        "low": bounds and bounds[0],
        "high": bounds and bounds[1],
        "rounds": ratios,
    }


def is_noisy(compared: dict[str, Any] | None) -> bool:
    """Whether the interval of a figure, which should be 1, excludes 1."""
    if compared is None or compared["low"] is None:
        return False
    return not compared["low"] <= 1 <= compared["high"]


def total_counts(
    rounds: Sequence[dict[str, Run]], arm: str, failed: int
) -> dict[str, float]:
    """Return what an arm counted, as the median over rounds; requests are the same.

    Args:
        rounds: that are timed.
        arm: whose.
        failed: requests that failed, in all rounds.
    """
    runs = [one[arm]["counts"] for one in rounds]
    out: dict[str, float] = {}
    for name in COUNTS:
        value = float(np.median([run[name] for run in runs]))
        out[name] = value if name == "hit_rate" else round(value)
    # A median would hide what failed in a few rounds.
    return {**out, "errors": failed}
