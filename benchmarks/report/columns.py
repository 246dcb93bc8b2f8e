"""Columns of results: said once, for terminals, JSON and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | float | None
Value = Scalar | dict[str, float]


@dataclass(frozen=True)
class Column:
    """A figure that every row of a result has.

    Attributes:
        title: above the column, and its name in JSON and CSV.
        value: takes a row and returns the figure; None where there is none. A dict
            holds figures that are shown together, such as both arms'.
        format: template of ``str.format`` for the terminal: of the figure, or of the
            parts of a dict by their names. Without one the column is text.
    """

    title: str
    value: Callable[[Any], Value]
    format: str = "{}"

    @property
    def is_text(self) -> bool:
        """Whether the column holds text, not figures."""
        return self.format == "{}"

    def text(self, row: Any) -> str:
        """Return the figure for a terminal."""
        value = self.value(row)
        if value is None:
            return ""
        if isinstance(value, dict):
            return self.format.format(**value)
        return self.format.format(value)

    def cells(self, row: Any) -> dict[str, Scalar]:
        """Return the figure for CSV: a cell, or one for each part of a dict."""
        value = self.value(row)
        if isinstance(value, dict):
            return {f"{self.title}, {part}": one for part, one in value.items()}
        return {self.title: value}


def records(columns: Sequence[Column], rows: Iterable[Any]) -> list[dict[str, Value]]:
    """Return a dict for each row, by title: for JSON."""
    return [{column.title: column.value(row) for column in columns} for row in rows]


def csv_text(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Return CSV with a line of titles and a line for each row."""
    lines = [
        {name: cell for column in columns for name, cell in column.cells(row).items()}
        for row in rows
    ]
    out = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
