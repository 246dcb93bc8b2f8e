"""The page of an A/B on real servers, from its report.json."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_radix_bench.html.bars import Bar, bars, legend
from vllm_radix_bench.html.curves import hit_rates, ttft_distribution
from vllm_radix_bench.html.maps import Cells, heat_map, mean_against_p99
from vllm_radix_bench.html.numbers import (
    NONE,
    amount,
    arrow,
    factors,
    finite,
    gain,
    inverse,
    percent,
    seconds,
    times,
    whole,
)
from vllm_radix_bench.html.parts import (
    Figure,
    Page,
    Section,
    Table,
    Verdict,
    dig,
    settings_table,
    to_json,
    words,
)

_VARIED = ("blocks", "rate")
ARMS = ("stock", "radix")
MANY = 8
"""Workloads from which on a click shows each."""
_LOADS = {
    "built-in": "requests of our own",
    "bench": "vllm bench serve",
    "trace": "a trace",
    "guidellm": "GuideLLM",
}
ABOUT_POINTS = (
    "Is the mean bought with the slowest requests? Then a point lies bottom right."
)
HOW_TO_READ = (
    "× is times better than {}: 2× is half the tokens, half the time, or twice the "
    "requests per second; below 1× is worse."
)
_TIMES = {
    "ttft": "TTFT",
    "tpot": "time per output token",
    "e2e": "whole request",
}
_PARTS = ("mean", "p50", "p90", "p99", "max")
_COUNTS = {
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "found in the cache",
    "computed_tokens": "computed",
    "generated_tokens": "generated tokens",
    "hit_rate": "hit rate",
    "preemptions": "preemptions",
    "errors": "errors",
}


def page_of(report: dict[str, Any]) -> Page:
    """Return the page of a report; see ``benchmarks/ab/report.schema.json``."""
    workloads = _titled(report.get("workloads") or [])
    noise = bool(report.get("times_are_noise"))
    folded = len(workloads) > MANY
    setup = report.get("setup") or {}
    machine = report.get("machine") or {}
    model = words(setup.get("model"))
    raw = {name: value for name, value in report.items() if name != "pieces"}
    version = dig(report, "versions", "vllm_radix") or ""
    started = str(report.get("started") or "").replace("T", " ").removesuffix("Z")
    about = (f"Stock vLLM against radix on {words(machine.get('device'))}", model,
             f"{started} UTC" if started else "")  # fmt: skip
    return Page(
        command="vllm-radix ab",
        title=f"Stock vLLM against radix: {model}",
        about=" · ".join(filter(None, about)),
        sentences=[str(report.get("sentence") or "")],
        warnings=list(_warnings(report, noise)),
        verdicts=[
            Verdict(bool(one.get("ok")), str(one.get("text") or ""))
            for one in report.get("verdicts") or ()
        ],
        facts=_facts(report, setup, machine),
        how_to_read=[HOW_TO_READ.format("stock")],
        overview=list(_overview(workloads, noise)),
        summary=[_summary(workloads)] if workloads else [],
        maps=list(_maps(workloads)),
        sections=[_section(one, folded) for one in workloads],
        settings=[
            settings_table("Options", setup),
            settings_table("Machine", machine),
            settings_table("Versions", report.get("versions") or {}),
        ],
        raw=to_json(raw),
        footer=f"Made by vllm-radix {version}. This file loads nothing.",
    )


def _warnings(report: dict[str, Any], noise: bool) -> Iterator[str]:
    warnings = [str(one) for one in report.get("warnings") or ()]
    yield from warnings
    if noise and not any("noise" in one for one in warnings):
        yield (
            "Times are noise here: the control, where both servers do the same work, "
            "shows a difference too. Counts are facts all the same."
        )


def _facts(
    report: dict[str, Any], setup: dict[str, Any], machine: dict[str, Any]
) -> list[tuple[str, str]]:
    cache = setup.get("cache") or {}
    rounds = finite(setup.get("rounds"))
    turns = (
        "both servers up at once" if setup.get("together") else "one server at a time"
    )
    blocks, of = whole(cache.get("blocks")), whole(cache.get("block_size"))
    size = f"{whole(cache.get('tokens'))} tokens: {blocks} blocks of {of}"
    hardware = f"{words(machine.get('processor'))}, {words(machine.get('cores'))} cores"
    memory = finite(machine.get("memory_gb"))
    loads = dict.fromkeys(
        _LOADS.get(str(one.get("load")), str(one.get("load")))
        for one in report.get("workloads") or ()
    )
    return [
        ("Model", words(setup.get("model"))),
        ("Device", words(machine.get("device"))),
        ("Machine", hardware + (f", {memory:.0f} GB" if memory else "")),
        ("Cache", size),
        ("Rounds", f"{whole(rounds)}, in turns; {turns}"),
        ("Load", ", ".join(loads) or NONE),
        ("Took", seconds(report.get("seconds"))),
        ("vLLM", words(dig(report, "versions", "vllm"))),
        ("Options of serve", words(setup.get("serve_options"))),
        ("Options of radix", words(setup.get("radix_options"))),
    ]


def _titled(workloads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return workloads with their titles: names, and what the matrix varied."""
    only = len({one.get("name") for one in workloads}) == 1 < len(workloads)
    varied = [
        key for key in _VARIED if len({dig(one, "cell", key) for one in workloads}) > 1
    ]
    return [{**one, "title": _title(one, not only, varied)} for one in workloads]


def _title(workload: dict[str, Any], is_named: bool, varied: Sequence[str]) -> str:
    cell = {key: finite(dig(workload, "cell", key)) for key in varied}
    blocks, rate = (cell.get(key) for key in _VARIED)
    parts = [str(workload.get("name") or "unnamed")]
    if workload.get("is_control") and "control" not in parts[0]:
        parts[0] += " (control)"
    if blocks is not None:
        parts.append(f"{blocks:,.0f} blocks")
    if rate is not None:
        parts.append(f"{rate:g}/s")
    return " · ".join(parts if is_named else parts[1:] or parts)


def _computed(workload: dict[str, Any]) -> Bar:
    stock, radix = (dig(workload, "counts", arm, "computed_tokens") for arm in ARMS)
    return Bar(
        workload["title"],
        gain(stock, radix),
        figures=arrow(whole(stock), whole(radix)),
        is_sure=True,
    )


def _timed(workload: dict[str, Any], metric: str, noise: bool) -> Bar:
    found = dig(workload, "times", metric) or {}
    better, unit = str(found.get("better") or "lower"), str(found.get("unit") or "")
    ends = [inverse(found.get(end), better) for end in ("low", "high")]
    low, high = ends if better == "higher" else ends[::-1]
    if low is None or high is None:
        low = high = None
    # The title of a rate names its unit.
    unit = unit if unit == "s" else ""
    return Bar(
        workload["title"],
        inverse(found.get("ratio"), better),
        low,
        high,
        arrow(*(amount(found.get(arm), unit) for arm in ARMS)),
        is_noise=noise,
    )


def _overview(workloads: Sequence[dict[str, Any]], noise: bool) -> Iterator[Figure]:
    if not workloads:
        return
    title = "Prompt tokens computed"
    yield Figure(title, bars(title, list(map(_computed, workloads))))
    for metric, title in (
        ("ttft_mean", "Time to first token, mean"),
        ("ttft_p99", "Time to first token, p99"),
        ("throughput", "Requests per second"),
    ):
        rows = [_timed(one, metric, noise) for one in workloads]
        bare = any(row.gain is not None and not row.has_interval for row in rows)
        note = "Without whiskers: too few rounds for an interval." if bare else ""
        yield Figure(title, bars(title, rows), note)
    points = [
        (mean.name, mean.gain, slow.gain)
        for one in workloads
        for mean, slow in [[_timed(one, f"ttft_{p}", noise) for p in ("mean", "p99")]]
        if mean.gain is not None and slow.gain is not None
    ]
    title = "Mean against p99"
    note = ABOUT_POINTS
    if len(points) > MANY:
        note += " Names that would overlap are left out; the table has all."
    if len(points) > 1:
        yield Figure(title, mean_against_p99(title, points), note)
    note = "Counts have no interval: they are facts. A time without one shows nothing."
    yield Figure("How to read the bars", legend(), note)


def _pair(workload: dict[str, Any], text: Callable[[Any], str], *keys: str) -> str:
    return arrow(*(text(dig(workload, keys[0], arm, *keys[1:])) for arm in ARMS))


def _both_lines(bar: Bar) -> str:
    """Return both arms' figures, and below them how many times better."""
    return bar.figures if bar.gain is None else f"{bar.figures}\n{bar.said()}"


def _answers(workload: dict[str, Any]) -> str:
    found = workload.get("answers")
    if not found:
        return "not compared"
    different, beyond = found.get("different"), found.get("beyond_doubt")
    if not different:
        return f"{whole(found.get('compared'))} alike"
    said = f"{whole(found.get('compared'))} compared, {whole(different)} differ"
    return f"{said}, {whole(beyond)} beyond doubt"


def _summary(workloads: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            one["title"],
            _both_lines(_computed(one)),
            _pair(one, percent, "counts", "hit_rate"),
            *(
                _both_lines(_timed(one, metric, False))
                for metric in ("ttft_mean", "ttft_p99", "throughput")
            ),
            f"{_pair(one, whole, 'counts', 'errors')}\n{_answers(one)}",
        )
        for one in workloads
    ]
    head = ("workload", "prompt tokens computed", "hit rate", "TTFT mean", "TTFT p99",
            "requests/s", "errors; answers compared")  # fmt: skip
    return Table("All workloads, stock → radix", head, rows)


def _maps(workloads: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for name in dict.fromkeys(str(one.get("name")) for one in workloads):
        mine = [one for one in workloads if str(one.get("name")) == name]
        if len(mine) < 2:
            continue
        for what, metric in (
            ("prompt tokens computed", None),
            ("mean TTFT", "ttft_mean"),
            ("TTFT p99", "ttft_p99"),
        ):
            gains = {
                _place(one): (
                    _timed(one, metric, False) if metric else _computed(one)
                ).gain
                for one in mine
            }
            title = f"{name}: {what}"
            made = Cells(
                _names(mine, "blocks"),
                _names(mine, "rate"),
                gains,
                "blocks",
                "requests/s",
            )
            yield Figure(title, heat_map(title, made))


def _place(workload: dict[str, Any]) -> tuple[str, str]:
    row, column = (finite(dig(workload, "cell", key)) for key in ("blocks", "rate"))
    return _cell_name(row), _cell_name(column)


def _cell_name(value: float | None) -> str:
    return (
        "as given" if value is None else f"{value:,g}" if value < 1e5 else whole(value)
    )


def _names(workloads: Sequence[dict[str, Any]], key: str) -> list[str]:
    found = {finite(dig(one, "cell", key)) for one in workloads}
    return [_cell_name(v) for v in sorted(found, key=lambda v: (v is None, v or 0.0))]


def _section(workload: dict[str, Any], folded: bool) -> Section:
    name = workload["title"]
    ttfts = {arm: dig(workload, "ttft_seconds", arm) or [] for arm in ARMS}
    rates = {arm: dig(workload, "hit_rate_over_time", arm) or [] for arm in ARMS}
    figures = [
        Figure(
            title := "Time to first token", ttft_distribution(f"{title}: {name}", ttfts)
        )
    ]
    if any(rates.values()):
        title = "Hit rate over time"
        figures.append(Figure(title, hit_rates(f"{title}: {name}", rates)))
    load = str(workload.get("load"))
    marks = [f"{whole(workload.get('requests'))} requests", _LOADS.get(load, load)]
    return Section(
        name,
        str(workload.get("what") or ""),
        marks,
        figures,
        [_counts(workload)],
        [_times(workload), *_tenants(workload)],
        folded,
    )


def _counts(workload: dict[str, Any]) -> Table:
    rows = []
    for key, title in _COUNTS.items():
        text = percent if key == "hit_rate" else whole
        rows.append((title, *(text(dig(workload, "counts", arm, key)) for arm in ARMS)))
    fewest = finite(workload.get("fewest_tokens"))
    note = f"Any cache would compute {whole(fewest)} or more." if fewest else ""
    answers = f"Answers: {_answers(workload)}."
    return Table("Counts", ("figure", *ARMS), rows, f"{note} {answers}".strip())


def _times(workload: dict[str, Any]) -> Table:
    rows = []
    found = workload.get("times") or {}
    for key, metric in found.items():
        kind, _, part = key.rpartition("_")
        title = key.replace("_", " ")
        if kind in _TIMES and part in _PARTS:
            title = f"{_TIMES[kind]}, {part}"
        bar = _timed(workload, key, False)
        unit = str(metric.get("unit") or "")
        interval = factors(bar.low, bar.high) if bar.has_interval else NONE
        figures = [amount(metric.get(arm), unit) for arm in ARMS]
        rows.append((title, *figures, times(bar.gain), interval))
    head = ("time", *ARMS, "times better", "95 % interval")
    return Table("All times", head, rows)


def _tenants(workload: dict[str, Any]) -> Iterator[Table]:
    found = workload.get("tenants") or []
    if not found:
        return
    rows = []
    for one in found:
        row = [str(one.get("name") or "no name"), whole(one.get("requests"))]
        for metric in ("ttft_mean", "ttft_p99"):
            stock, radix = (dig(one, metric, arm) for arm in ARMS)
            row += [arrow(seconds(stock), seconds(radix)), times(gain(stock, radix))]
        rows.append(row)
    head = (
        "tenant",
        "requests",
        "TTFT mean",
        "times better",
        "TTFT p99",
        "p99, times better",
    )
    yield Table("Tenants, stock → radix", head, rows)
