"""The tables of an A/B's report, for a terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from vllm_radix_bench.ab.figures import LEAST_ROUNDS, RATIO_ROUNDS, is_noisy
from vllm_radix_bench.ab.gates import label
from vllm_radix_bench.ab.servers import ARMS
from vllm_radix_bench.report.columns import Column, PairColumn, Value
from vllm_radix_bench.report.tables import print_table, say

_RATIO = ("ratio", "low", "high")
_SHOWN = ("ttft_mean", "ttft_p50", "ttft_p99", "tpot_mean", "e2e_p99", "throughput")


def _of_counts(name: str) -> Callable[[Any], Value]:
    return lambda one: {arm: one["counts"][arm][name] for arm in ARMS}


_NAME = Column("workload", label, is_name=True)

COUNTS = (
    _NAME,
    Column("requests", lambda one: one["requests"], "{:,}"),
    PairColumn("hit rate", _of_counts("hit_rate"), "{:.1%}"),
    PairColumn("tokens computed", _of_counts("computed_tokens"), "{:,}"),
    Column("fewest possible", lambda one: one["fewest_tokens"], "{:,}"),
    PairColumn("preempted", _of_counts("preemptions"), "{:,}"),
    PairColumn("failed", _of_counts("errors"), "{:,}"),
)
"""What the servers counted; medians over rounds."""


def _note(value: dict[str, Any]) -> str:
    if value["ratio"] is None:
        return ""
    said = f"{value['ratio']:.2f}"
    if value["low"] is not None:
        said += f" ({value['low']:.2f}-{value['high']:.2f})"
    return f"{said} noise" if value["noise"] else said


def _time_column(name: str, noisy: set[str], with_ratio: bool) -> PairColumn:
    kind, _, share = name.partition("_")
    title = f"{kind.upper()} {share}" if share else f"{name}, requests/s"
    # A token takes milliseconds.
    factor, form = (1e3, "{:.2f} ms") if kind == "tpot" else (1.0, "{:.3f} s")

    def value(one: Any) -> Value:
        times = one["times"][name]
        kept = {arm: times[arm] * factor for arm in ARMS}
        ratio = {key: times[key] if with_ratio else None for key in _RATIO}
        return {**kept, **ratio, "noise": name in noisy}

    return PairColumn(title, value, form if share else "{:.2f}", note=_note)


def show(report: dict[str, Any], out: Console) -> None:
    """Print a report: counts, times, verdicts, warnings."""
    workloads = report["workloads"]
    noisy = {
        name
        for one in workloads
        if one["is_control"]
        for name, times in one["times"].items()
        if is_noisy(times)
    }
    print_table(out, "Counts: stock → radix, medians over rounds", COUNTS, workloads)
    shown = [name for name in _SHOWN if all(name in one["times"] for one in workloads)]
    rounds = report["setup"]["rounds"]
    with_ratio = rounds >= RATIO_ROUNDS
    columns = (_NAME, *(_time_column(name, noisy, with_ratio) for name in shown))
    interval = "95 % intervals" if rounds >= LEAST_ROUNDS else "no intervals"
    title = f"Times: stock → radix; {rounds} round{'s' * (rounds > 1)}, {interval}"
    print_table(out, title, columns, workloads)
    for one in report["verdicts"]:
        say(out, f"  {'ok  ' if one['ok'] else 'MISS'}  {one['text']}")
    for text in report["warnings"]:
        say(out, f"  note  {text}")
