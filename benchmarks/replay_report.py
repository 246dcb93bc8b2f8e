"""What a replay says, as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table


def counts_table(result: dict[str, Any]) -> Table:
    """Return facts: what was computed, and by how much more than it need be."""
    table = Table(title="counts: the same in every run")
    for name in (
        "cache, blocks",
        "arm",
        "hit rate",
        "tokens computed",
        "x infinite cache",
        "x known in advance",
        "engine steps",
        "preemptions",
        "overtaken, most",
    ):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for cell in result["cells"]:
        known = cell.get("known_in_advance")
        for name, arm in cell["arms"].items():
            computed = arm["computed_prompt_tokens"]
            table.add_row(
                f"{cell['blocks']:,}",
                name,
                f"{arm['hit_rate']:.1%}",
                f"{computed:,}",
                f"{computed / result['infinite_cache']:.2f}",
                f"{computed / known:.2f}" if known else "",
                f"{arm['engine_steps']:,}",
                f"{arm['preemptions']:,}",
                f"{arm['overtaken_most']:,}",
            )
    return table


def times_table(result: dict[str, Any]) -> Table:
    """Return times on the virtual clock, and CPU of this machine."""
    table = Table(title="seconds on the cost model's clock; CPU of this machine")
    columns = ("cache, blocks", "arm", "TTFT mean", "p50", "p90", "p99", "max")
    for name in (*columns, "requests/s", "Jain of 1/TTFT", "scheduler CPU, ms/request"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    used = result["machine"]["scheduler_cpu_seconds_per_request"]
    for cell, cpu in zip(result["cells"], used, strict=True):
        for name, arm in cell["arms"].items():
            table.add_row(
                f"{cell['blocks']:,}",
                name,
                *(
                    f"{arm['ttft'][k]:.3f}"
                    for k in ("mean", "p50", "p90", "p99", "max")
                ),
                f"{arm['requests_per_second']:.2f}",
                f"{arm['jain']:.3f}",
                f"{cpu[name] * 1e3:.2f}",
            )
    return table


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result."""
    console.print(counts_table(result))
    console.print(times_table(result))
    cost = result["options"]["cost"]
    console.print(
        "Cost model: " + ", ".join(f"{name}={value:g}" for name, value in cost.items()),
        highlight=False,
    )
