"""What an A/B run says: tables for a reader, verdicts for a script."""

from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.console import Console

from vllm_radix_bench.ab.offline.runner import ARMS, GAP
from vllm_radix_bench.report.columns import (
    NOTEWORTHY,
    Column,
    PairColumn,
    Value,
    change,
)
from vllm_radix_bench.report.tables import print_table, say

Cell = dict[str, Any]

LEAST_PAIRS = 3
"""Pairs of runs below which nothing is said of times."""


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
    bounds = ("max_overtakes", "max_extra_wait", "patience")
    return radix.get("policy") != "fcfs" and all(radix.get(b) != 0 for b in bounds)


def rows_of(result: dict[str, Any]) -> list[Cell]:
    """Return the cells of the counts that have runs, with what is known of noise.

    Each gets ``noise``: for each measure, whether the control, which computes the same
    in both arms, shows a difference at this pressure; None where there is no control.
    """
    cells = [cell for cell in result["counts"] if all(cell["runs"].values())]
    asked = {
        name: {measure: differs(cell, measure) for measure in MEASURES}
        for cell in cells
        if cell["workload"] == "control"
        for name in [cell["asked"]]
    }
    none = dict.fromkeys(MEASURES)
    return [{**cell, "noise": asked.get(cell["asked"], none)} for cell in cells]


def _first(cell: Cell, arm: str = "stock") -> Cell:
    run: Cell = cell["runs"][arm][0]
    return run


def _of_both(take: Callable[[Cell], float]) -> Callable[[Cell], Value]:
    return lambda cell: {arm: take(_first(cell, arm)) for arm in ARMS}


def steps(run: Cell) -> list[float]:
    """Return the engine steps from sending to the first token, of each request."""
    return [record["steps_to_first_token"] for record in run["records"]]


_CELL = (
    Column("workload", lambda cell: cell["workload"], is_name=True),
    Column("working set", lambda cell: cell["pressure"], "{:.2f}x", is_name=True),
)
COUNTS = (
    *_CELL,
    Column("requests", lambda cell: _first(cell)["requests"], "{:,}"),
    Column("prompt tokens", lambda cell: _first(cell)["prompt_tokens"], "{:,}"),
    PairColumn(
        "hit rate",
        _of_both(lambda run: run["cached_tokens"] / run["prompt_tokens"]),
        "{:.1%}",
    ),
    PairColumn(
        "tokens computed", _of_both(lambda run: run["computed_prompt_tokens"]), "{:,}"
    ),
    Column(
        "ratio of tokens",
        lambda cell: computed(cell, "radix") / computed(cell, "stock"),
        "{:.3f}",
    ),
    PairColumn("engine steps", _of_both(lambda run: run["engine_steps"]), "{:,}"),
    PairColumn("preempted", _of_both(lambda run: run["preemptions"]), "{:,}"),
    PairColumn(
        "steps to first token, mean", _of_both(lambda run: fmean(steps(run))), "{:,.0f}"
    ),
    PairColumn(
        "steps to first token, p99",
        _of_both(lambda run: percentile(steps(run), 0.99)),
        "{:,.0f}",
    ),
)
"""Of a cell: facts, of stock and of radix."""


def ratios(cell: Cell, measure: str) -> list[float]:
    """Return radix over stock, one for each pair of runs made in turn."""
    take = MEASURES[measure]
    pairs = zip(cell["runs"]["stock"], cell["runs"]["radix"], strict=True)
    return [take(radix) / take(stock) for stock, radix in pairs]


def has_times(cell: Cell) -> bool:
    """Whether a cell has pairs enough for its times to be compared."""
    return len(cell["runs"]["stock"]) >= LEAST_PAIRS


def differs(cell: Cell, measure: str) -> bool:
    """Whether all pairs are on one side: the range of ratios excludes 1."""
    pairs = ratios(cell, measure)
    return not min(pairs) <= 1 <= max(pairs)


def _note(value: dict[str, Any]) -> str:
    if value["ratio"] is None:
        return ""
    noise = " noise" if value["noise"] else ""
    return f"{value['ratio']:.2f} ({value['lowest']:.2f}-{value['highest']:.2f}){noise}"


def _time_column(measure: str) -> Column:
    take = MEASURES[measure]

    def value(cell: Cell) -> Value:
        pairs = ratios(cell, measure) if has_times(cell) else []
        return {
            **{arm: median(map(take, cell["runs"][arm])) for arm in ARMS},
            "ratio": median(pairs) if pairs else None,
            "lowest": min(pairs, default=None),
            "highest": max(pairs, default=None),
            "noise": cell["noise"][measure] if pairs else None,
        }

    unit = " s" if measure.startswith("TTFT") else ""
    return PairColumn(measure, value, f"{{:.2f}}{unit}", note=_note)


TIMES = (*_CELL, *map(_time_column, MEASURES))
"""Of a cell: times, as medians and as ratios with their range."""

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


def headline(rows: list[Cell], texts: list[Cell]) -> str:
    """Return the result in a sentence.

    It is of the cells under pressure, if there are any, but for the control; what got
    worse is named wherever it did.
    """
    shared = [cell for cell in rows if cell["workload"] != "control"] or rows
    chosen = [cell for cell in shared if is_loaded(cell)] or shared
    parts = []
    if chosen:
        stock, radix = (sum(computed(cell, arm) for cell in chosen) for arm in ARMS)
        asked = sorted({cell["asked"] for cell in chosen})
        sets = " and ".join(f"{one:g}x" for one in asked)
        names = ", ".join(dict.fromkeys(cell["workload"] for cell in chosen))
        parts.append(
            f"radix computed {change(stock, radix)} prompt tokens ({stock:,} → "
            f"{radix:,}) on {names} with a working set of {sets} the cache"
        )
        waits = [
            median(step for cell in chosen for step in steps(_first(cell, arm)))
            for arm in ARMS
        ]
        parts.append(f"median wait {waits[0]:,.0f} → {waits[1]:,.0f} steps")
        worse = list(_worse(rows))
        if worse:
            parts.append("p99 got worse: " + ", ".join(worse))
    if texts:
        equal, total = map(sum, zip(*map(compared, texts), strict=True))
        parts.append(f"greedy texts equal: {equal} of {total}")
    return "; ".join(parts) + "."


def _worse(rows: list[Cell]) -> Iterator[str]:
    for cell in rows:
        where = f"{cell['workload']} at {cell['asked']:g}x"
        stock, radix = (percentile(steps(_first(cell, arm)), 0.99) for arm in ARMS)
        if radix > NOTEWORTHY * stock:
            yield f"{where} ({stock:,.0f} → {radix:,.0f} steps)"
        slower = has_times(cell) and min(ratios(cell, "TTFT p99")) > 1
        if slower and cell["noise"]["TTFT p99"] is False:
            ratio = median(ratios(cell, "TTFT p99"))
            yield f"{where} (TTFT {ratio:.2f} times stock's)"


def _show_times(rows: list[Cell], out: Console) -> None:
    pairs = min(len(cell["runs"]["stock"]) for cell in rows)
    if pairs < LEAST_PAIRS:
        made = "one pair of runs says" if pairs == 1 else f"{pairs} pairs of runs say"
        say(
            out,
            f"Times are not compared: {made} nothing about them; --repeats "
            f"{LEAST_PAIRS} or more, without --quick, gives a range.",
        )
        return
    title = f"Times: median of {pairs} runs; radix / stock: median (range) of pairs"
    print_table(out, title, TIMES, rows)
    if any(noise is None for cell in rows for noise in cell["noise"].values()):
        say(out, "Without the control workload it is not known which times are noise.")
    elif any(noise for cell in rows for noise in cell["noise"].values()):
        say(out, "noise: the control, which shares nothing, shows a difference too.")


def groups_of(result: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each model whose cache is not what pressures count with.

    The groups of a hybrid model share the blocks, and vLLM makes blocks larger where a
    state has to fit into one.
    """
    block_size = result["options"]["block_size"]
    for part in ("counts", "texts"):
        runs = [run for cell in result[part] for run in cell["runs"]["stock"]]
        # Pieces that an earlier version kept do not tell.
        groups = runs[0]["engine"].get("groups", ()) if runs else ()
        if len(groups) > 1 or any(size != block_size for _, size in groups):
            names = ", ".join(f"{name} of {size}" for name, size in groups)
            yield (
                f"In the {part} the model's cache has groups of blocks ({names} "
                "tokens); working sets are reckoned with one group of blocks of "
                f"{block_size}."
            )


def show(result: dict[str, Any], out: Console) -> bool:
    """Print a result, but for its sentence.

    Returns:
        Whether everything that was to be shown was.
    """
    rows = rows_of(result)
    if rows:
        title = "Counts (stock → radix; the same in every run)"
        print_table(out, title, COUNTS, rows)
        _show_times(rows, out)
    for cell in result["texts"]:
        for d in cell["differences"]:
            say(
                out,
                f"{cell['workload']} request {d['id']}: token {d['at']} is "
                f"{d['stock']} in stock and {d['radix']} in radix; stock's two most "
                f"likely tokens are {d['gap']:.2e} apart",
            )
    if not result["texts"]:
        say(out, "No texts were compared.")
    for sentence in groups_of(result):
        say(out, sentence)
    checks = verdicts(result)
    for fine, text in checks:
        say(out, f"  {'ok  ' if fine else 'MISS'}  {text}")
    return all(fine for fine, _ in checks)
