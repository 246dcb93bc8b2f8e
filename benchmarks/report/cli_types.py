"""What command lines share: numbers that are checked, help, and an error."""

import argparse
from collections.abc import Callable
from functools import partial


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
