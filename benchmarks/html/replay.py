"""The page of a replay, from its result."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm_radix_bench.html.ab import ABOUT_POINTS, HOW_TO_READ, MANY
from vllm_radix_bench.html.bars import Bar, bars, legend
from vllm_radix_bench.html.curves import hit_rates, ttft_distribution
from vllm_radix_bench.html.maps import Cells, heat_map, mean_against_p99
from vllm_radix_bench.html.numbers import arrow, digits, gain, seconds, times, whole
from vllm_radix_bench.html.parts import (
    Figure,
    Page,
    Section,
    Table,
    dig,
    settings_table,
    to_json,
    words,
)
from vllm_radix_bench.replay.report import COUNTS, TIMES, Row, rows_of
from vllm_radix_bench.replay.verdict import cache_size, compared, too_much_load
from vllm_radix_bench.report.columns import Column

_LEFT_OUT = ("requests", "rows", "hit_rate_over_time")
"""Parts of a result that are long; the JSON file has them."""
_CLOCK = "Times are on the clock of the cost model, and the same in every run."


def page_of(result: dict[str, Any]) -> Page:
    """Return the page of a replay's result."""
    source = str(result["source"])
    than = _baseline(result)
    rows = rows_of(result)
    sentences = [one for cell in result["cells"] if (one := compared(result, cell))]
    first = result["cells"][0]
    requests = len(next(iter(first["requests"].values())))
    about = f"vLLM's scheduler without a model · {source} · {whole(requests)} requests"
    version = result["versions"].get("vllm-radix", "")
    short = {
        **result,
        "cells": [
            {key: value for key, value in cell.items() if key not in _LEFT_OUT}
            for cell in result["cells"]
        ],
    }
    short.pop("rows", None)
    cost = result["options"]["cost"]
    options = {key: one for key, one in result["options"].items() if key != "cost"}
    return Page(
        command="vllm-radix replay",
        title=f"Replay of {source}",
        about=about,
        sentences=sentences or [f"{', '.join(first['arms'])}: {source}, replayed."],
        warnings=list(too_much_load(result)),
        facts=_facts(result, source, requests),
        how_to_read=[HOW_TO_READ.format(than), _CLOCK],
        overview=list(_overview(result, rows, than)),
        summary=[
            _table("Counts: the same in every run", COUNTS, rows),
            _table("Times on the cost model's clock; CPU of this machine", TIMES, rows),
        ],
        maps=list(_maps(rows, than)),
        sections=[_section(result, cell) for cell in result["cells"]],
        settings=[
            settings_table("Requests", result["input"]),
            settings_table("Options", options),
            settings_table("Cost model", cost),
            settings_table("Versions", result["versions"]),
        ],
        raw=to_json(short),
        footer=f"Made by vllm-radix {version}. This file loads nothing.",
    )


def _baseline(result: dict[str, Any]) -> str:
    """Return the arm that others are compared with: stock, or else the first."""
    arms = list(result["cells"][0]["arms"])
    return "stock" if "stock" in arms else arms[0]


def _ordered(names: Iterable[str], than: str) -> list[str]:
    """Return arms in the order of their lines: stock, radix, others."""
    kinds = {"stock": 0, "radix": 1}
    return sorted(names, key=lambda n: -1 if n == than else kinds.get(n, 2))


def _facts(result: dict[str, Any], source: str, requests: int) -> list[tuple[str, str]]:
    options = result["options"]
    first = next(iter(result["cells"][0]["arms"].values()))
    sizes = "; ".join(cache_size(result, cell["blocks"]) for cell in result["cells"])
    return [
        ("Requests", f"{whole(requests)} of {source}"),
        ("Prompt tokens", whole(first["prompt_tokens"])),
        ("Sent within", seconds(result["last_arrival"])),
        ("Cache", sizes),
        ("Arms", ", ".join(result["cells"][0]["arms"])),
        ("Requests at once", whole(options["max_num_seqs"])),
        ("Tokens in a step", whole(options["max_num_batched_tokens"])),
        ("vLLM", words(result["versions"].get("vllm"))),
    ]


def _label(row: Row, rows: Sequence[Row]) -> str:
    several = len({row.blocks for row in rows}) > 1
    return f"{row.name} · {row.blocks:,} blocks" if several else row.name


def _pairs(rows: Sequence[Row], than: str) -> Iterator[tuple[Row, Row]]:
    """Yield each row that is compared, and what it is compared with."""
    base = {row.blocks: row for row in rows if row.name == than}
    yield from ((base[row.blocks], row) for row in rows if row.name != than)


def _bar(
    name: str, before: Any, after: Any, figures: str, better: str = "lower"
) -> Bar:
    return Bar(name, gain(before, after, better), figures=figures, is_sure=True)


def _ttft(rows: Sequence[Row], than: str, part: str) -> list[Bar]:
    out = []
    for base, row in _pairs(rows, than):
        before, after = (one.arm["ttft"][part] for one in (base, row))
        figures = arrow(seconds(before), seconds(after))
        out.append(_bar(_label(row, rows), before, after, figures))
    return out


def _tokens(result: dict[str, Any], rows: Sequence[Row], than: str) -> Iterator[Bar]:
    """Yield a bar for each arm, and for what no arm can do better than."""
    for base, row in _pairs(rows, than):
        figures = arrow(whole(base.computed), whole(row.computed))
        yield _bar(_label(row, rows), base.computed, row.computed, figures)
    for base in rows:
        if base.name != than:
            continue
        bounds = {"known in advance": base.known,
                  "infinite cache (bound)": result["infinite_cache"]}  # fmt: skip
        for name, tokens in bounds.items():
            if tokens is not None:
                figures = arrow(whole(base.computed), whole(tokens))
                label = _label(base, rows).replace(than, name, 1)
                yield _bar(label, base.computed, tokens, figures)


def _overview(
    result: dict[str, Any], rows: Sequence[Row], than: str
) -> Iterator[Figure]:
    title = "Prompt tokens computed"
    yield Figure(title, bars(title, list(_tokens(result, rows, than)), than))
    pairs = list(_pairs(rows, than))
    if not pairs:
        return
    mean, slow = (_ttft(rows, than, part) for part in ("mean", "p99"))
    for title, made in (
        ("Time to first token, mean", mean),
        ("Time to first token, p99", slow),
    ):
        yield Figure(title, bars(title, made, than))
    title = "Requests per second"
    rates = []
    for base, row in pairs:
        before, after = (one.arm["requests_per_second"] for one in (base, row))
        figures = arrow(digits(before), digits(after))
        rates.append(_bar(_label(row, rows), before, after, figures, "higher"))
    yield Figure(title, bars(title, rates, than))
    points = [
        (one.name, one.gain, other.gain)
        for one, other in zip(mean, slow, strict=True)
        if one.gain and other.gain
    ]
    title = "Mean against p99"
    if len(points) > 1:
        yield Figure(title, mean_against_p99(title, points, than), ABOUT_POINTS)
    note = "A replay is the same in every run: its figures have no interval."
    yield Figure("How to read the bars", legend(has_intervals=False), note)


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Return a table of a replay's columns; cache and arm are one."""
    shown = [
        column
        for column in columns
        if not column.is_name and any(column.text(row) for row in rows)
    ]
    lines = [
        [_label(row, rows), *(column.text(row) for column in shown)] for row in rows
    ]
    return Table(title, ("arm", *(column.title for column in shown)), lines)


def _maps(rows: Sequence[Row], than: str) -> Iterator[Figure]:
    """Yield maps of caches and arms, where several caches were replayed."""
    blocks = list(dict.fromkeys(row.blocks for row in rows))
    arms = list(dict.fromkeys(row.name for row in rows if row.name != than))
    if len(blocks) < 2 or not arms:
        return
    names = [f"{one:,}" for one in blocks]
    for title, figure in (
        ("Prompt tokens computed", lambda row: row.computed),
        ("Mean TTFT", lambda row: row.arm["ttft"]["mean"]),
        ("TTFT p99", lambda row: row.arm["ttft"]["p99"]),
    ):
        gains = {
            (f"{row.blocks:,}", row.name): gain(figure(base), figure(row))
            for base, row in _pairs(rows, than)
        }
        made = Cells(names, arms, gains, "blocks", "arm")
        yield Figure(title, heat_map(title, made, than))


def _section(result: dict[str, Any], cell: dict[str, Any]) -> Section:
    name = f"{cell['blocks']:,} blocks"
    column = result["request_columns"].index("ttft")
    than = _baseline(result)
    arms = _ordered(cell["arms"], than)
    ttfts = {arm: [row[column] for row in cell["requests"][arm]] for arm in arms}
    rates = {arm: cell["hit_rate_over_time"][arm] for arm in arms}
    first, over_time = "Time to first token", "Hit rate over time"
    figures = [
        Figure(first, ttft_distribution(f"{first}: {name}", ttfts)),
        Figure(over_time, hit_rates(f"{over_time}: {name}", rates)),
    ]
    size = cache_size(result, cell["blocks"])
    tenants = list(_tenants(cell, arms, than))
    folded = len(result["cells"]) > MANY
    return Section(name, f"{size}.", (), figures, more=tenants, is_folded=folded)


def _tenants(cell: dict[str, Any], arms: Sequence[str], than: str) -> Iterator[Table]:
    found = cell["arms"][than]["tenants"]
    for arm in arms:
        if arm == than or not found:
            continue
        rows = []
        for name in found:
            row = [name or "no name"]
            for part in ("mean", "p99"):
                before, after = (
                    dig(cell, "arms", one, "tenants", name, part) for one in (than, arm)
                )
                row.append(arrow(seconds(before), seconds(after)))
                row.append(times(gain(before, after)))
            rows.append(row)
        head = ("tenant", "TTFT mean", "times better", "TTFT p99", "p99, times better")
        yield Table(f"Tenants, {than} → {arm}", head, rows)
