"""Numbers on a command line, refused with the values that are allowed."""

import argparse
from collections.abc import Callable
from functools import partial


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


pressure = partial(number, float, 0.1, 100)
