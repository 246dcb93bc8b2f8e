"""What ``top`` prints of a server: for people, and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from vllm_radix_bench.report.columns import Column
from vllm_radix_bench.report.tables import print_table, say
from vllm_radix_bench.top.figures import (
    FIGURES,
    STATES,
    Figure,
    State,
    lately,
    since_start,
)
from vllm_radix_bench.top.scrape import Page

_BY_ENGINE = ("requests running", "requests waiting", "  held", "blocks cached")
_RUNNING = "vllm:num_requests_running"


@dataclass(frozen=True)
class Line:
    """A figure as it is shown.

    Attributes:
        title: its name.
        now: lately.
        total: since the start.
    """

    title: str
    now: str
    total: str


def lines(page: Page, before: Page | None) -> list[Line]:
    """Return the figures that a server has; a stock one has fewer."""
    found = []
    for state in STATES:
        text = _text(state, page)
        if text:
            found.append(Line(state.title, text, ""))
    for figure in FIGURES:
        total = since_start(page, figure)
        if total is None or (figure.is_rare and not total):
            continue
        now = None if before is None else lately(before, page, figure)
        found.append(Line(figure.title, _lately(figure, now), _format(figure, total)))
    return found


def _format(figure: Figure, value: float | None) -> str:
    return "" if value is None else figure.format.format(value)


def _lately(figure: Figure, value: float | None) -> str:
    if value is None or not figure.is_count:
        return _format(figure, value)
    return f"{value:,.1f}/s"


def _text(state: State, page: Page, **labels: str) -> str:
    value = state.value(page, **labels)
    if value is None:
        return ""
    text = state.format.format(value)
    whole = None if state.of is None else state.of(page, **labels)
    return text if whole is None else f"{text} of {state.format.format(whole)}"


def heading(page: Page) -> str:
    """Return a sentence on which server it is."""
    models = ", ".join(page.values_of("model_name", _RUNNING)) or "a server"
    engines = len(page.values_of("engine", _RUNNING))
    of = f" on {engines} engines" if engines > 1 else ""
    info = page.labels_of("vllm_radix:info")
    if info is not None:
        how = (
            f"radix {info['version']}, policy {info['policy']}, patience "
            f"{info['patience']}, eviction {info['eviction']}, {info['manager']}"
        )
    elif page.sum("vllm_radix:queried_tokens_total") is not None:
        how = "radix; it says more after its first request"
    else:
        how = "stock vLLM: what is radix's own is missing"
    return f"{models}{of}: {how}"


def show(out: Console, page: Page, before: Page | None) -> None:
    """Print a server's figures."""
    now = "now" if before is None else f"last {page.at - before.at:.0f} s"
    columns = [
        Column("", lambda line: line.title, is_name=True),
        Column(now, lambda line: line.now, "{:>}"),
        Column("since start", lambda line: line.total, "{:>}"),
    ]
    say(out, heading(page))
    print_table(out, "", columns, lines(page, before))
    engines = page.values_of("engine", _RUNNING)
    if len(engines) > 1:
        print_table(out, "Engines", _engine_columns(page), engines)


def _engine_columns(page: Page) -> Sequence[Column]:
    columns = [Column("engine", str, is_name=True)]
    for state in STATES:
        if state.title in _BY_ENGINE and _text(state, page):

            def cell(engine: str, state: State = state) -> str:
                return _text(state, page, engine=engine)

            columns.append(Column(state.title.strip(), cell, "{:>}"))
    rate = FIGURES[0]

    def hit_rate(engine: str) -> str:
        return _format(rate, since_start(page, rate, engine=engine))

    return [*columns, Column("hit rate", hit_rate, "{:>}")]


def record(url: str, page: Page, before: Page | None) -> dict[str, Any]:
    """Return the same for JSON, as numbers.

    Args:
        url: of the server.
        page: read now.
        before: read before, if one was.
    """
    now: dict[str, float] = {}
    for state in STATES:
        value = state.value(page)
        if value is not None:
            now[state.title.strip()] = value
    found: dict[str, Any] = {
        "url": url,
        "models": page.values_of("model_name", _RUNNING),
        "engines": page.values_of("engine", _RUNNING),
        "radix": page.labels_of("vllm_radix:info"),
        "now": now,
        "total": _numbers([(f, since_start(page, f)) for f in FIGURES]),
    }
    if before is not None:
        found["seconds"] = page.at - before.at
        found["lately"] = _numbers([(f, lately(before, page, f)) for f in FIGURES])
    return found


def _numbers(figures: list[tuple[Figure, float | None]]) -> dict[str, float]:
    return {
        figure.title.strip(): value for figure, value in figures if value is not None
    }
