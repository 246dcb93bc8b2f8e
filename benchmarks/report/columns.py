"""Columns of results: said once, for terminals, JSON and CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | float | None
Value = Scalar | dict[str, Scalar]


@dataclass(frozen=True)
class Column:
    """A figure that every row of a result has.

    Attributes:
        title: above the column, and its name in JSON and CSV.
        value: takes a row and returns the figure; None where there is none. A dict
            holds figures that are shown together, such as both arms'.
        format: template of ``str.format`` for the terminal: of the figure, or of the
            parts of a dict by their names. Without one the column is text.
        is_name: whether the column tells rows apart.
    """

    title: str
    value: Callable[[Any], Value]
    format: str = "{}"
    is_name: bool = False

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


@dataclass(frozen=True)
class PairColumn(Column):
    """A figure of two arms; where a table is narrow, each arm has its column.

    Attributes:
        value: takes a row and returns a dict: the figure of each arm, and what ``note``
            needs.
        format: of one arm's figure.
        note: takes that dict and returns what is said of both arms.
        arms: names of the two.
    """

    note: Callable[[dict[str, Any]], str] = lambda value: ""
    arms: tuple[str, str] = ("stock", "radix")

    @property
    def is_text(self) -> bool:
        """Whether the column holds text: it holds figures."""
        return False

    def text(self, row: Any) -> str:
        """Return the figures for a terminal: the first arm's, an arrow, the second's.

        The note is a line below them.
        """
        first, second, note = self.texts(row)
        return f"{first} → {second}" + (f"\n{note}" if note else "")

    def texts(self, row: Any) -> tuple[str, str, str]:
        """Return the figures of both arms, and the note."""
        value = self.value(row)
        assert isinstance(value, dict)
        first, second = (self.format.format(value[arm]) for arm in self.arms)
        return first, second, self.note(value)


NOTEWORTHY = 1.005
"""Factor from which a figure got worse, not only other."""


def change(before: float, after: float) -> str:
    """Return how many fewer or more there are, in words: 35 % fewer."""
    if before == after:
        return "as many"
    share = abs(after - before) / before * 100 if before else math.inf
    word = "fewer" if after < before else "more"
    if share < 0.01:
        return f"less than 0.01 % {word}"
    said = f"{share:.{0 if share >= 1 else 2}f}"
    if said == "100" and 0 < after < before:
        said = f"{min(share, 99.99):.2f}"  # some is left
    return f"{said} % {word}"


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
