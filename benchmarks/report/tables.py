"""Tables for a terminal: no figure is ever cut.

A table that is too wide is laid out another way: arms become columns and figures
rows, a few arms in a table; at last, a figure a line.
"""

import io
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from vllm_radix_bench.report.columns import Column, PairColumn
from vllm_radix_bench.report.output import OutputFile

_LABEL = 26
"""Longest line of a figure's name where figures are rows."""
_HEADING = 16
"""Longest line of an arm's name where arms are columns."""
_PIPED = 160
"""Columns where there is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Print nothing more: who reads no further still wants the exit code."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console(width: int = _PIPED) -> Console:
    """Return a console; ``width`` is that where there is no terminal.

    Sentences are printed as they are: names may look like markup.
    """
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows no arrow is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    return _Console(
        width=None if known else width, markup=False, highlight=False, emoji=False
    )


def say(out: Console, text: str) -> None:
    """Print a sentence: broken between words on a terminal, elsewhere a line."""
    out.print(text, soft_wrap=not out.is_terminal)


def say_where(
    out: Console, what: str, output: OutputFile, csv: OutputFile | None
) -> None:
    """Print where the results are; what no file would take is printed itself."""
    for file, text in ((output, what), (csv, "The table")):
        if file is not None and file.unsaved is not None:
            out.file.write(f"{file.unsaved}\n")
        elif file is not None:
            say(out, f"{text} is in {file.path}.")


def table(
    title: str, columns: Sequence[Column], rows: Iterable[Any], wrap: bool = False
) -> Table:
    """Return a table; text stands on the left, figures on the right.

    Args:
        title: above it.
        columns: of it.
        rows: of it.
        wrap: whether headings are as narrow as what is below them.
    """
    out = Table(title=title)
    rows = list(rows)
    texts = [[column.text(row) for row in rows] for column in columns]
    for column, below in zip(columns, texts, strict=True):
        heading = _wrapped(column.title, _width(below)) if wrap else column.title
        justify = "left" if column.is_text else "right"
        out.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for cells in zip(*texts, strict=True):
        out.add_row(*cells)
    return out


def print_table(
    out: Console, title: str, columns: Sequence[Column], rows: Sequence[Any]
) -> None:
    """Print rows in the first layout that fits the console."""
    for wrap in (False, True):
        wide = table(title, columns, rows, wrap)
        if _fits(out, wide):
            out.print(wide)
            return
    say(out, title)
    narrow = list(
        _by_arm(columns, rows)
        if any(isinstance(column, PairColumn) for column in columns)
        else _turned(columns, rows, out.width)
    )
    if all(_fits(out, one) for one in narrow):
        for one in narrow:
            out.print(one)
        return
    for row in rows:
        for column in columns:
            text = column.text(row).replace("\n", ", ")
            if text:
                space = "" if column.is_name else "  "
                say(out, f"{space}{column.title}: {text}")


def _by_arm(columns: Sequence[Column], rows: Sequence[Any]) -> Iterator[Table]:
    """Yield a table for each row: its figures below each other, arms side by side."""
    pairs = [column for column in columns if isinstance(column, PairColumn)]
    others = [column for column in columns if not isinstance(column, PairColumn)]
    for row in rows:
        title = ", ".join(
            column.text(row) if column.is_text else f"{column.title} {column.text(row)}"
            for column in others
        )
        lines = [(column.title, *column.texts(row)) for column in pairs]
        out = _narrow(title, "")
        for arm in pairs[0].arms:
            out.add_column(arm, justify="right", no_wrap=True)
        has_notes = any(note for *_, note in lines)
        if has_notes:
            out.add_column(" / ".join(pairs[0].arms[::-1]), no_wrap=True)
        for name, *cells, note in lines:
            cells = [*cells, note] if has_notes else cells
            out.add_row(_wrapped(name, _LABEL), *cells)
        yield out


def _turned(
    columns: Sequence[Column], rows: Sequence[Any], width: int
) -> Iterator[Table]:
    """Yield tables with a column for each row, as many in one as fit."""
    names = [column for column in columns if column.is_name]
    figures = [column for column in columns if not column.is_name]
    label = max(_width([_wrapped(column.title, _LABEL)]) for column in columns)
    shown: list[tuple[str, list[str], int]] = []
    for row in rows:
        texts = [column.text(row) for column in figures]
        least = max(_width(texts), min(_HEADING, max(len(c.text(row)) for c in names)))
        heading = "\n".join(_wrapped(column.text(row), least) for column in names)
        shown.append((heading, texts, max(least, _width([heading]))))
    while shown:
        used, count = label + 2, 0
        for *_, wide in shown:
            used += wide + 2
            if count and used > width:
                break
            count += 1
        now, shown = shown[:count], shown[count:]
        out = _narrow("", "\n".join(column.title for column in names))
        for heading, *_ in now:
            out.add_column(heading, justify="right", no_wrap=True)
        for number, column in enumerate(figures):
            cells = [texts[number] for _, texts, _ in now]
            out.add_row(_wrapped(column.title, _LABEL), *cells)
        yield out


def _narrow(title: str, corner: str) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    out.add_column(corner, no_wrap=True)
    return out


def _wrapped(text: str, width: int) -> str:
    """Return text in lines of ``width``; words longer than it are broken."""
    longest = max(map(len, text.split()), default=1)
    # A heading's words stay whole; a name without spaces may be long.
    return "\n".join(textwrap.wrap(text, max(width, min(longest, _HEADING), 1)))


def _width(texts: Iterable[str]) -> int:
    return max((len(line) for text in texts for line in text.splitlines()), default=0)


def _fits(out: Console, made: Table) -> bool:
    options = out.options.update(width=10_000)
    return Measurement.get(out, options, made).maximum <= out.width
