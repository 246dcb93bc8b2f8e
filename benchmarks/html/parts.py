"""What a page is made of; the template knows no more."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        title: above it.
        svg: the chart.
        note: below it.
    """

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: above it.
        head: names of the columns.
        rows: of text.
        note: below it.
        is_text: whether cells stand on the left, as text does.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of it.
        text: below the title.
        marks: short words beside the title.
        figures: charts.
        tables: open ones.
        more: tables that a click shows.
        is_folded: whether a click shows the section; paper shows it always.
    """

    title: str
    text: str = ""
    marks: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    more: Sequence[Table] = ()
    is_folded: bool = False


@dataclass(frozen=True)
class Verdict:
    """A check, and whether it held."""

    ok: bool
    text: str


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        command: that made the result.
        title: of the window.
        about: the line above the sentence.
        sentences: what came out; the first one is the largest text of the page.
        warnings: what a reader must know first.
        verdicts: checks.
        facts: what was run: names and values.
        how_to_read: of the charts.
        overview: charts of all workloads.
        summary: tables of all workloads.
        maps: where it helps.
        sections: one for each workload.
        settings: tables of options and versions.
        raw: the result as JSON.
        footer: the last line.
    """

    command: str
    title: str
    about: str
    sentences: Sequence[str]
    facts: Sequence[tuple[str, str]]
    how_to_read: Sequence[str]
    footer: str
    warnings: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()
    overview: Sequence[Figure] = ()
    summary: Sequence[Table] = ()
    maps: Sequence[Figure] = ()
    sections: Sequence[Section] = ()
    settings: Sequence[Table] = ()
    raw: str = field(default="", repr=False)


def dig(value: Any, *keys: str) -> Any:
    """Return what lies below keys; None where one is missing."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def to_json(value: Any) -> str:
    """Return a value as JSON; what is no number there is null."""
    return json.dumps(_without_nan(value), indent=1)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def words(value: Any) -> str:
    """Return a setting as a reader writes it: options with spaces, yes, no, none."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k}={words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(words, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def settings_table(title: str, settings: dict[str, Any]) -> Table:
    """Return a table of names and values."""
    rows = [(name, words(value)) for name, value in settings.items()]
    return Table(title, ("name", "value"), rows, is_text=True)
