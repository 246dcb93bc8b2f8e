"""What a replay says, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from vllm_radix_bench.replay.verdict import cache_size, in_each, num_engines
from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.tables import print_table, say


@dataclass(frozen=True)
class Row:
    """An arm with a cache.

    Attributes:
        blocks: of the cache.
        name: of the arm.
        arm: what the run did; see ``summary.summary``.
        infinite_cache: tokens that an infinite cache computes.
        known: tokens computed with all requests known in advance; None if not run.
        scheduler_cpu: seconds a request, of this machine.
        routing: rule by which requests got their engines; empty for one engine.
        routing_cpu: seconds a request, of this machine.
    """

    blocks: int
    name: str
    arm: dict[str, Any]
    infinite_cache: int
    known: int | None
    scheduler_cpu: float
    routing: str = ""
    routing_cpu: float = 0.0

    @property
    def computed(self) -> int:
        """Prompt tokens computed."""
        tokens: int = self.arm["computed_prompt_tokens"]
        return tokens


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Return the rows of a result."""
    used = result["machine"]["scheduler_cpu_seconds_per_request"]
    routed = result["machine"].get("routing_cpu_seconds_per_request", [{}] * len(used))
    return [
        Row(
            cell["blocks"],
            name,
            arm,
            result["infinite_cache"],
            cell.get("known_in_advance"),
            cpu[name],
            cell.get("routing", ""),
            routing_cpu.get(name, 0.0),
        )
        for cell, cpu, routing_cpu in zip(result["cells"], used, routed, strict=True)
        for name, arm in cell["arms"].items()
    ]


_ARM = (
    Column("cache, blocks", lambda row: row.blocks, "{:,}", is_name=True),
    Column("arm", lambda row: row.name, is_name=True),
)
COUNTS = (
    *_ARM,
    Column("hit rate", lambda row: row.arm["hit_rate"], "{:.1%}"),
    Column(
        "best eviction",
        lambda row: row.arm.get("hit_rate_best_eviction"),
        "{:.1%}",
    ),
    Column("tokens computed", lambda row: row.computed, "{:,}"),
    Column("x infinite cache", lambda row: row.computed / row.infinite_cache, "{:.2f}"),
    Column(
        "x known in advance",
        lambda row: row.computed / row.known if row.known else None,
        "{:.2f}",
    ),
    Column("engine steps", lambda row: row.arm["engine_steps"], "{:,}"),
    Column("preemptions", lambda row: row.arm["preemptions"], "{:,}"),
    Column("overtaken, most", lambda row: row.arm["overtaken_most"], "{:,}"),
)
"""Facts: what was computed, and by how much more than it need be."""

TIMES = (
    *_ARM,
    Column("TTFT mean", lambda row: row.arm["ttft"]["mean"], "{:.3f} s"),
    Column("TTFT p50", lambda row: row.arm["ttft"]["p50"], "{:.3f} s"),
    Column("TTFT p90", lambda row: row.arm["ttft"]["p90"], "{:.3f} s"),
    Column("TTFT p99", lambda row: row.arm["ttft"]["p99"], "{:.3f} s"),
    Column("TTFT max", lambda row: row.arm["ttft"]["max"], "{:.3f} s"),
    Column("requests/s", lambda row: row.arm["requests_per_second"], "{:.2f}"),
    Column("Jain of 1/TTFT", lambda row: row.arm["jain"], "{:.3f}"),
    Column(
        "scheduler CPU, ms/request", lambda row: row.scheduler_cpu * 1e3, "{:.2f} ms"
    ),
)
"""Times on the virtual clock, and CPU of this machine."""

COLUMNS = (*COUNTS, *TIMES[len(_ARM) :])
"""All of them, for JSON and CSV."""

_ROUTED = (
    Column("blocks an engine", lambda row: row.blocks, "{:,}", is_name=True),
    Column("routing", lambda row: row.routing, is_name=True),
    Column("arm", lambda row: row.name, is_name=True),
)
_FLEET_COUNTS = (
    *_ROUTED,
    Column("hit rate", lambda row: row.arm["hit_rate"], "{:.1%}"),
    Column("tokens computed", lambda row: row.computed, "{:,}"),
    Column("x fewest", lambda row: row.computed / row.infinite_cache, "{:.2f}"),
    Column("engine steps", lambda row: row.arm["engine_steps"], "{:,}"),
    Column("preemptions", lambda row: row.arm["preemptions"], "{:,}"),
    Column(
        "tokens, busiest / mean", lambda row: row.arm["imbalance"]["tokens"], "{:.2f}"
    ),
    Column(
        "requests, busiest / mean",
        lambda row: row.arm["imbalance"]["requests"],
        "{:.2f}",
    ),
)
"""Facts of several engines: what they computed together, and how evenly."""
_ROUTING_CPU = Column(
    "routing CPU, ms/request", lambda row: row.routing_cpu * 1e3, "{:.3f} ms"
)


def counts_of(result: dict[str, Any]) -> tuple[Column, ...]:
    """Return the columns of what was counted."""
    return COUNTS if num_engines(result) is None else _FLEET_COUNTS


def times_of(result: dict[str, Any]) -> tuple[Column, ...]:
    """Return the columns of times."""
    if num_engines(result) is None:
        return TIMES
    return *_ROUTED, *TIMES[len(_ARM) :], _ROUTING_CPU


def columns_of(result: dict[str, Any]) -> tuple[Column, ...]:
    """Return all columns, for JSON and CSV."""
    if num_engines(result) is None:
        return COLUMNS
    return *_FLEET_COUNTS, *times_of(result)[len(_ROUTED) :]


def show(result: dict[str, Any], rows: Sequence[Row], out: Console) -> None:
    """Print a result, but for its sentences."""
    print_table(out, "Counts: the same in every run", counts_of(result), rows)
    title = "Times on the cost model's clock; CPU of this machine"
    print_table(out, title, times_of(result), rows)
    cost = result["options"]["cost"]
    costs = ", ".join(f"{name}={value:g}" for name, value in cost.items())
    blocks = dict.fromkeys(cell["blocks"] for cell in result["cells"])
    sizes = "; ".join(cache_size(result, one) for one in blocks)
    say(out, f"Cost model: {costs}")
    say(out, f"Cache: {sizes}{in_each(num_engines(result))}.")
