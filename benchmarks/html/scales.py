"""Axes: from figures to places, and where their ticks are."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm_radix_bench.html.svg import text_width

_GAP = 8
"""Least space between the labels of two ticks."""
_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Axis:
    """A linear or a logarithmic axis.

    Attributes:
        low: figure at its start.
        high: figure at its end.
        start: place of ``low``.
        end: place of ``high``; may be before ``start``.
        log: whether it is logarithmic; figures up to 0 are at its start then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a figure; what is beyond the axis is at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, text: Callable[[float], str]) -> list[float]:
        """Return as many round figures as there is space for their labels."""
        single: list[float] = []
        for values in self._choices():
            found = [v for v in values if self.low * (1 - 1e-9) <= v <= self.high]
            kept = self._apart(found, text)
            single = single or found[:1]
            if len(kept) >= 2 and kept == found:
                return found
            # Those at the narrow end of a logarithmic axis may do without labels.
            enough = len(kept) >= 3 and len(found) <= 6
            if self.log and enough and (1 in kept or 1 not in found):
                return kept
        return single

    def _apart(
        self, values: Sequence[float], text: Callable[[float], str]
    ) -> list[float]:
        """Return the figures whose labels do not touch one before."""
        kept: list[float] = []
        ends = -math.inf
        for value in sorted(values, key=self):
            half = text_width(text(value)) / 2
            if self(value) - half >= ends:
                kept.append(value)
                ends = self(value) + half + _GAP
        return kept if self.start <= self.end else kept[::-1]

    def _choices(self) -> Iterator[list[float]]:
        """Yield the figures that ticks may be at, the closest first."""
        if not self.log or self.high / self.low < 4:
            yield from self._linear()
        if self.log:
            lowest = math.floor(math.log10(self.low))
            highest = math.ceil(math.log10(self.high))
            yield [s * 10.0**p for p in range(lowest, highest + 1) for s in _STEPS]
            for stride in (1, 2, 3, 4, 6):
                first = lowest - lowest % stride
                yield [10.0**p for p in range(first, highest + 1, stride)]

    def _linear(self) -> Iterator[list[float]]:
        span = self.high - self.low
        least = math.floor(math.log10(span / 12))
        for step in (s * 10.0**p for p in range(least, least + 4) for s in _STEPS):
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            if last - first <= 7:
                yield [round(i * step, 12) for i in range(first, last + 1)]


def around_one(
    values: Sequence[float], start: float, end: float, before: float, after: float
) -> Axis:
    """Return a logarithmic axis of factors, with space on both sides of 1.

    Args:
        values: to hold.
        start: its place.
        end: its end.
        before: least distance of 1 from ``start``.
        after: least distance of 1 from ``end``.
    """
    low = math.log(max(min([*values, 0.9]), 1e-6)) * 1.1
    high = math.log(min(max([*values, 1.1]), 1e6)) * 1.1
    size = abs(end - start)
    # Where 1 is too close to an end, that end moves.
    low = min(low, -high * before / (size - before))
    high = max(high, -low * after / (size - after))
    return Axis(math.exp(low), math.exp(high), start, end, log=True)


def of_times(values: Sequence[float], start: float, end: float) -> Axis:
    """Return a logarithmic axis of seconds; those up to 0 are left out."""
    above = [value for value in values if value > 0] or [1.0]
    low, high = min(above), max(above)
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    room = (high / low) ** 0.03
    return Axis(low / room, high * room, start, end, log=True)
