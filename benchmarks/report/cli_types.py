"""What command lines share: numbers that are checked, help, and an error."""

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path


class InputError(ValueError):
    """What was asked for cannot be run; the message names the option."""


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, but for options that have none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, {}):
            return action.help
        return super()._get_help_string(action)


def number(kind: type, least: float, most: float, text: str) -> int | float:
    """Return a number from ``least`` to ``most``.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value: int | float = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:  # nor is "nan"
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {what} from {least} to {most}"
        )
    return value


def whole(least: int) -> Callable[[str], int | float]:
    """Return the type of an option that is a whole number, up to a million."""
    return partial(number, int, least, 1_000_000)


LEAST_FACTOR = 1e-6
"""The least speed-up, or factor on lengths."""

pressure = partial(number, float, 0.1, 100)


def refuse_same_file(named: Mapping[str, Path | None]) -> None:
    """Refuse to write over an input, or one output over another.

    Args:
        named: files by the options that name them, inputs first.

    Raises:
        InputError: two are the same file.
    """
    known: dict[str, str] = {}
    for name, path in named.items():
        if path is None:
            continue
        other = known.setdefault(os.path.realpath(path), name)
        if other != name:
            raise InputError(f"{name}: {path} is {other}, too; allowed: another file")
