"""What an A/B run says: tables for a reader, verdicts for a script."""

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.console import Console

from vllm_radix_bench.ab.runner import ARMS, GAP
from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.tables import table

Cell = dict[str, Any]


def percentile(values: list[float], share: float) -> float:
    """Return a percentile by linear interpolation, ``share`` in 0..1."""
    return float(np.quantile(values, share))


def ttfts(run: Cell) -> list[float]:
    """Return the times to first token of a run, in seconds."""
    return [record["ttft"] for record in run["records"]]


MEASURES: dict[str, Any] = {
    "TTFT mean": lambda run: sum(ttfts(run)) / len(ttfts(run)),
    "TTFT p50": lambda run: percentile(ttfts(run), 0.50),
    "TTFT p99": lambda run: percentile(ttfts(run), 0.99),
    "requests/s": lambda run: run["requests"] / run["seconds"],
}


def computed(cell: Cell, arm: str) -> int:
    """Return the prompt tokens computed in the first run of a cell."""
    tokens: int = cell["runs"][arm][0]["computed_prompt_tokens"]
    return tokens


def is_loaded(cell: Cell) -> bool:
    """Whether the working set is far larger than the cache."""
    return bool(cell["pressure"] >= 2)


def reorders(result: dict[str, Any]) -> bool:
    """Whether radix was told to use another order than stock."""
    radix = result["options"]["radix"]
    return radix.get("policy") != "fcfs" and radix.get("max_overtakes") != 0


def _first(cell: Cell, arm: str = "stock") -> Cell:
    run: Cell = cell["runs"][arm][0]
    return run


def _of_both(take: Callable[[Cell], float]) -> Callable[[Cell], dict[str, float]]:
    return lambda cell: {arm: take(_first(cell, arm)) for arm in ARMS}


def _steps(run: Cell) -> list[float]:
    return [record["steps_to_first_token"] for record in run["records"]]


_CELL = (
    Column("workload", lambda cell: cell["workload"]),
    Column("working set", lambda cell: cell["pressure"], "{:.2f}x"),
)
COUNTS = (
    *_CELL,
    Column("requests", lambda cell: _first(cell)["requests"], "{:d}"),
    Column("prompt tokens", lambda cell: _first(cell)["prompt_tokens"], "{:,}"),
    Column(
        "hit rate",
        _of_both(lambda run: run["cached_tokens"] / run["prompt_tokens"]),
        "{stock:.1%} → {radix:.1%}",
    ),
    Column(
        "tokens computed",
        _of_both(lambda run: run["computed_prompt_tokens"]),
        "{stock:,} → {radix:,}",
    ),
    Column(
        "ratio",
        lambda cell: computed(cell, "radix") / computed(cell, "stock"),
        "{:.3f}",
    ),
    Column(
        "engine steps",
        _of_both(lambda run: run["engine_steps"]),
        "{stock:d} → {radix:d}",
    ),
    Column(
        "preempted", _of_both(lambda run: run["preemptions"]), "{stock:d} → {radix:d}"
    ),
    Column(
        "steps to first token, mean",
        _of_both(lambda run: fmean(_steps(run))),
        "{stock:.0f} → {radix:.0f}",
    ),
    Column(
        "steps to first token, p99",
        _of_both(lambda run: percentile(_steps(run), 0.99)),
        "{stock:.0f} → {radix:.0f}",
    ),
)
"""Of a cell: facts, of stock and of radix."""


def ratios(cell: Cell, measure: str) -> list[float]:
    """Return radix over stock, one for each pair of runs made in turn."""
    take = MEASURES[measure]
    pairs = zip(cell["runs"]["stock"], cell["runs"]["radix"], strict=True)
    return [take(radix) / take(stock) for stock, radix in pairs]


def _time_column(measure: str) -> Column:
    take = MEASURES[measure]

    def value(cell: Cell) -> dict[str, float]:
        pairs = ratios(cell, measure)
        return {
            **{arm: median(map(take, cell["runs"][arm])) for arm in ARMS},
            "ratio": median(pairs),
            "lowest": min(pairs),
            "highest": max(pairs),
        }

    unit = " s" if measure.startswith("TTFT") else ""
    return Column(
        measure,
        value,
        f"{{stock:.2f}} → {{radix:.2f}}{unit}\n"
        "{ratio:.2f} ({lowest:.2f} to {highest:.2f})",
    )


TIMES = (*_CELL, *map(_time_column, MEASURES))
"""Of a cell: times, as medians and as ratios with their spread."""

COLUMNS = (*COUNTS, *TIMES[len(_CELL) :])
"""All of them, for JSON and CSV."""


def compared(cell: Cell) -> tuple[int, int]:
    """Return how many answers of a text cell are equal, and how many there are."""
    total = cell["runs"]["stock"][0]["requests"]
    lost = {difference["id"] for difference in cell["differences"]}
    after = {
        record["id"]
        for record in cell["runs"]["stock"][0]["records"]
        if any(record["id"].startswith(f"{path}.") for path in lost)
    }
    return total - len(lost) - len(after), total - len(after)


def is_tie(difference: dict[str, Any]) -> bool:
    """Whether the model was undecided between the two arms' tokens."""
    gap = difference["gap"]
    return gap is not None and gap <= GAP and difference["radix"] in difference["top"]


def verdicts(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """Return what was to be shown, and whether it was."""
    out = []
    for cell in result["counts"]:
        stock, radix = computed(cell, "stock"), computed(cell, "radix")
        name = f"{cell['workload']} at {cell['pressure']:.2f}x"
        if cell["workload"] == "control":
            # Two texts may open with the same few words by chance.
            fine = 0.99 * stock <= radix <= stock
            out.append((fine, f"{name}: as many tokens as stock, less 1 % at most"))
        elif is_loaded(cell) and reorders(result):
            out.append((radix < stock, f"{name}: fewer tokens computed than stock"))
        else:
            fine = radix <= 1.01 * stock
            out.append((fine, f"{name}: not more tokens than stock, within 1 %"))
        repeated = all(
            run["computed_prompt_tokens"] == computed(cell, arm)
            for arm in ARMS
            for run in cell["runs"][arm]
        )
        if not repeated:
            out.append((False, f"{name}: the counts differ from run to run"))
    for cell in result["texts"]:
        fine = all(map(is_tie, cell["differences"]))
        equal, total = compared(cell)
        text = f"{cell['workload']} texts: {equal} of {total} equal to stock's"
        out.append((fine, text))
    return out


def headline(result: dict[str, Any]) -> str:
    """Return the result in a sentence."""
    loaded = [
        cell
        for cell in result["counts"]
        if is_loaded(cell) and cell["workload"] != "control"
    ]
    parts = []
    if loaded:
        factors = {
            cell["workload"]: computed(cell, "stock") / computed(cell, "radix")
            for cell in loaded
        }
        saved = ", ".join(f"{name} {factor:.1f}x" for name, factor in factors.items())
        parts.append(f"Stock computes more prompt tokens than radix: {saved}")
    if result["texts"]:
        equal, total = map(sum, zip(*map(compared, result["texts"]), strict=True))
        parts.append(f"greedy texts equal: {equal} of {total}")
    return "; ".join(parts) + "." if parts else "Nothing under pressure was run."


def show(result: dict[str, Any], console: Console) -> bool:
    """Print a result.

    Returns:
        Whether everything that was to be shown was.
    """
    if result["counts"]:
        title = "Counts (stock → radix; the same in every run)"
        console.print(table(title, COUNTS, result["counts"]))
        title = "Times: median of runs; ratio radix/stock, lowest to highest"
        console.print(table(title, TIMES, result["counts"]))
    for cell in result["texts"]:
        for d in cell["differences"]:
            console.print(
                f"{cell['workload']} request {d['id']}: token {d['at']} is "
                f"{d['stock']} in stock and {d['radix']} in radix; stock's two most "
                f"likely tokens are {d['gap']:.2e} apart"
            )
    if not result["texts"]:
        console.print("No texts were compared.")
    checks = verdicts(result)
    for fine, text in checks:
        console.print(f"  {'ok  ' if fine else 'MISS'}  {text}", highlight=False)
    console.print(headline(result), highlight=False)
    return all(fine for fine, _ in checks)
