"""What an A/B run says: tables for a reader, verdicts for a script."""

from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_radix_bench.ab import ARMS, GAP

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


def counts_table(cells: list[Cell]) -> Table:
    """Return the deterministic counts; ``a > b`` is stock, then radix."""
    table = Table(title="Counts (stock > radix; the same in every run)")
    table.add_column("workload")
    for name in ("working set", "requests", "prompt tokens"):
        table.add_column(name, justify="right")
    for name in ("hit rate", "tokens computed", "ratio", "engine steps", "preempted"):
        table.add_column(name, justify="right")
    table.add_column("steps to first token, mean and p99", justify="right")
    for cell in cells:
        stock, radix = (cell["runs"][arm][0] for arm in ARMS)
        hits = [run["cached_tokens"] / run["prompt_tokens"] for run in (stock, radix)]
        waits = [
            f"{sum(steps) / len(steps):.0f}, {percentile(steps, 0.99):.0f}"
            for run in (stock, radix)
            for steps in [[record["steps_to_first_token"] for record in run["records"]]]
        ]
        table.add_row(
            cell["workload"],
            f"{cell['pressure']:.2f}x",
            f"{stock['requests']}",
            f"{stock['prompt_tokens']:,}",
            f"{hits[0]:.1%} > {hits[1]:.1%}",
            f"{computed(cell, 'stock'):,} > {computed(cell, 'radix'):,}",
            f"{computed(cell, 'radix') / computed(cell, 'stock'):.3f}",
            f"{stock['engine_steps']} > {radix['engine_steps']}",
            f"{stock['preemptions']} > {radix['preemptions']}",
            f"{waits[0]} > {waits[1]}",
        )
    return table


def ratios(cell: Cell, measure: str) -> list[float]:
    """Return radix over stock, one for each pair of runs made in turn."""
    take = MEASURES[measure]
    pairs = zip(cell["runs"]["stock"], cell["runs"]["radix"], strict=True)
    return [take(radix) / take(stock) for stock, radix in pairs]


def times_table(cells: list[Cell]) -> Table:
    """Return the times, as medians and as ratios with their spread."""
    table = Table(title="Times: median of runs; ratio radix/stock, lowest to highest")
    table.add_column("workload")
    table.add_column("working set", justify="right")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for cell in cells:
        row = [cell["workload"], f"{cell['pressure']:.2f}x"]
        for name, take in MEASURES.items():
            values = [median(map(take, cell["runs"][arm])) for arm in ARMS]
            pairs = ratios(cell, name)
            unit = " s" if name.startswith("TTFT") else ""
            row.append(
                f"{values[0]:.2f} > {values[1]:.2f}{unit}\n"
                f"{median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
            )
        table.add_row(*row)
    return table


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
        console.print(counts_table(result["counts"]))
        console.print(times_table(result["counts"]))
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
