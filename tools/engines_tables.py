"""The tables of docs/more-than-one-engine.md, from the committed results."""

import json
from typing import Any

from doc_tables import ROOT, table

from vllm_radix_bench.routing import ROUTINGS
from vllm_radix_bench.study import scale

_RESULTS = ROOT / "benchmarks/results/engines"
_ROUTED = _RESULTS / "2026-11-26-seed-0.json"
_SCALE = _RESULTS / "2026-11-27-scale.json"


def rules() -> str:
    """Return the table of routing rules."""
    rows = []
    for name, rule in ROUTINGS.items():
        said = (rule.__doc__ or "").partition("\n")[0]
        options = [
            f"`{key}` ({one.default:,}): {one.about}"
            for key, one in rule.options.items()
        ]
        rows.append((f"`{name}`", said, rule.like, "; ".join(options)))
    return table(("rule", "sends a request to", "as", "options (default)"), rows)


def _arrivals(run: dict[str, Any]) -> str:
    return f"at load {run['rate']:g}" if run["rate"] else "at once"


def _pair(run: dict[str, Any], rule: str) -> str:
    arms = run["routings"][rule]
    stock, radix = (
        round(arms[arm]["computed_prompt_tokens"] / 1000) for arm in ("stock", "radix")
    )
    return f"{stock:,} → {radix:,}"


def tokens() -> str:
    """Return the thousands of tokens computed, by load and rule."""
    head = ("load", "working set", "sent", "engines", *ROUTINGS, "fewest")
    rows = [
        (
            run["workload"],
            f"{run['pressure']:g} x",
            _arrivals(run),
            str(run["engines"]),
            *(_pair(run, rule) for rule in ROUTINGS),
            f"{round(run['fewest'] / 1000):,}",
        )
        for run in json.loads(_ROUTED.read_text())
    ]
    return table(head, rows)


def times_and_balance() -> str:
    """Return p99 TTFT and the busiest engine's share, of four engines with radix."""
    head = ("load", "working set", "sent", *ROUTINGS)
    rows = []
    for run in json.loads(_ROUTED.read_text()):
        if run["engines"] == 4:
            radix = [run["routings"][rule]["radix"] for rule in ROUTINGS]
            cells = [
                f"{one['ttft']['mean']:.2f} / {one['ttft']['p99']:.2f} s, "
                f"{one['imbalance']['tokens']:.2f}"
                for one in radix
            ]
            name = f"{run['pressure']:g} x"
            rows.append((run["workload"], name, _arrivals(run), *cells))
    return table(head, rows)


def _numbers() -> dict[str, float]:
    result = json.loads(_SCALE.read_text())
    return {**result["units"], **result["scenario"], **result["cost"]}


def parts() -> str:
    """Return what each part of the path takes, with its formula."""
    head = ("part", "in", "takes", "of what there is", "full at requests/s", "engines")
    rows = []
    for row in scale.rows_of(_numbers()):
        full = [
            "" if row[name] is None else f"{row[name]:,.0f}"
            for name in ("requests", "engines")
        ]
        share = f"{row['share']:,.2f}"
        rows.append((row["part"], row["where"], row["takes"], share, *full))
    return table(head, rows)


def formulas() -> str:
    """Return the formula of each part."""
    rows = [(part.name, f"`{part.formula}`") for part in scale.PARTS]
    return table(("part", "formula"), rows)


def units() -> str:
    """Return what a unit costs, as measured."""
    result = json.loads(_SCALE.read_text())
    rows = [(f"`{name}`", f"{one:,.3g}") for name, one in result["units"].items()]
    return table(("unit", "measured"), rows)


def counts() -> str:
    """Return what there is of events and series."""
    found = scale.counts(_numbers())
    return table(("what", "how many"), [(k, f"{v:,.0f}") for k, v in found.items()])


def simulated() -> str:
    """Return what rules compute among more engines, over the fewest possible."""
    rows = []
    for run in json.loads(_SCALE.read_text())["simulated"]:
        cells = [column.text(run) for column in scale.SIMULATED_COLUMNS]
        rows.append(cells)
    return table([column.title for column in scale.SIMULATED_COLUMNS], rows)


def breaks_first() -> str:
    """Return which parts are full first, as sentences."""
    return " ".join(scale.sentences(_numbers()))
