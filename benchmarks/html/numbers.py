"""Figures as a reader reads them; what is no figure is a dash."""

import math
from typing import Any

NONE = "–"
"""Where there is no figure."""
SPACE = "\u00a0"
"""Where no line ends: before a unit."""
_MINUTE, _HOUR = 60, 3600


def finite(value: Any) -> float | None:
    """Return a number as a float; None for everything else, NaN among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: Any) -> str:
    """Return a count: 12,345."""
    number = finite(value)
    return NONE if number is None else f"{number:,.0f}"


def percent(value: Any) -> str:
    """Return a share of 1 in percent: 17.9 %."""
    number = finite(value)
    return NONE if number is None else f"{number * 100:.1f}{SPACE}%"


def digits(number: float) -> str:
    """Return a number with about three digits, and never in powers of ten."""
    size = abs(number)
    if size and size < 0.01:
        return f"{number:.3f}" if size >= 0.0005 else f"{number:.2g}"
    if size < 10:
        return f"{number:.2f}"
    return f"{number:.1f}" if size < 100 else f"{number:,.0f}"


def seconds(value: Any) -> str:
    """Return a time: 412 ms, 1.24 s, 2.5 min."""
    number = finite(value)
    if number is None:
        return NONE
    if number == 0:
        return f"0{SPACE}s"
    if abs(number) < 1e-3:
        return f"{digits(number * 1e6)}{SPACE}µs"
    if abs(number) < 1:
        return f"{digits(number * 1e3)}{SPACE}ms"
    if abs(number) < 10 * _MINUTE:
        return f"{digits(number)}{SPACE}s"
    if abs(number) < 3 * _HOUR:
        return f"{digits(number / _MINUTE)}{SPACE}min"
    return f"{digits(number / _HOUR)}{SPACE}h"


def amount(value: Any, unit: str) -> str:
    """Return a figure with its unit."""
    if unit == "s":
        return seconds(value)
    number = finite(value)
    return NONE if number is None else f"{digits(number)}{SPACE}{unit}".rstrip(SPACE)


def arrow(stock: str, radix: str) -> str:
    """Return both arms' figures on one line."""
    return f"{stock}{SPACE}→{SPACE}{radix}"


def times(value: Any) -> str:
    """Return a factor: 2.9×."""
    number = finite(value)
    if number is None:
        return NONE
    size = abs(number)
    if size < 0.0005:
        return "0×" if size == 0 else "<0.001×"
    if size < 0.1:
        return f"{number:.3f}".rstrip("0") + "×"
    return f"{digits(number)}×"


def factors(low: Any, high: Any) -> str:
    """Return an interval of factors: 2.6 to 3.3."""
    return f"{times(low)} to {times(high)}".replace("×", "")


def gain(stock: Any, radix: Any, better: str = "lower") -> float | None:
    """Return how many times better radix is than stock; None where that is no number.

    Args:
        stock: its figure.
        radix: its figure.
        better: ``lower`` where less is better, or ``higher``.
    """
    before, after = finite(stock), finite(radix)
    if before is None or after is None or before < 0 or after < 0:
        return None
    if before == after:
        return 1.0
    if better == "higher":
        before, after = after, before
    return before / after if before and after else None


def inverse(ratio: Any, better: str = "lower") -> float | None:
    """Return how many times better a ratio of radix to stock is."""
    number = finite(ratio)
    if number is None or number <= 0:
        return None
    return number if better == "higher" else 1 / number
