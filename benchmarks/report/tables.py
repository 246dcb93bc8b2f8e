"""Tables for a terminal."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_radix_bench.report.columns import Column


def table(title: str, columns: Sequence[Column], rows: Iterable[Any]) -> Table:
    """Return a table; text stands on the left, figures on the right."""
    out = Table(title=title)
    for column in columns:
        out.add_column(column.title, justify="left" if column.is_text else "right")
    for row in rows:
        out.add_row(*(column.text(row) for column in columns))
    return out


def console(width: int) -> Console:
    """Return a console; ``width`` fits the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else width)
