"""Bars: how many times better radix is than stock, with intervals.

Better is always to the right of the line at 1. A bar is filled where radix is better,
hatched where it is worse, and an outline where no difference is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vllm_radix_bench.html.numbers import factors, times
from vllm_radix_bench.html.scales import Axis, around_one
from vllm_radix_bench.html.svg import (
    WIDTH,
    box,
    chart,
    element,
    hatch,
    label,
    name_with_title,
    number,
    path,
    text_width,
)

_ROW, _TOP, _BAR = 38, 22, 11
_BOTTOM = 36
_SIDE = 6


@dataclass(frozen=True)
class Bar:
    """A row.

    Attributes:
        name: of the workload.
        gain: how many times better; None where that is no number.
        low: of its interval; None without one.
        high: of its interval; None without one.
        figures: both arms' figures, in words.
        is_sure: whether the figure is a count, which no other run changes.
        is_noise: whether nothing is to be read from it.
    """

    name: str
    gain: float | None
    low: float | None = None
    high: float | None = None
    figures: str = ""
    is_sure: bool = False
    is_noise: bool = False

    @property
    def has_interval(self) -> bool:
        """Whether there is one."""
        return self.low is not None and self.high is not None

    @property
    def kind(self) -> str:
        """Return ``better``, ``worse``, or ``open`` where neither is shown."""
        if self.gain is None or self.is_noise:
            return "open"
        if self.low is not None and self.high is not None:
            shown = self.low > 1 or self.high < 1
        else:
            shown = self.is_sure and abs(self.gain - 1) > 0.005
        if not shown:
            return "open"
        return "better" if self.gain > 1 else "worse"

    def said(self) -> str:
        """Return the gain in words, with its interval."""
        if self.gain is None:
            return self.figures or "no figure"
        if self.low is None or self.high is None:
            return times(self.gain)
        return f"{times(self.gain)} ({factors(self.low, self.high)})"


def bars(title: str, rows: Sequence[Bar], than: str = "stock") -> Markup:
    """Return a chart of gains, a row for each workload.

    Args:
        title: of the chart.
        rows: from top to bottom.
        than: what they are compared with.
    """
    if not rows:
        return chart(40, title, "No figures.", label(0, 24, "No figures.", kind="dim"))
    known = [
        v for r in rows for v in (r.gain, r.low, r.high) if v is not None and v > 0
    ]
    axis = around_one(
        known,
        _SIDE,
        WIDTH - _SIDE,
        text_width("◂ worse") + 6,
        text_width("better ▸") + 6,
    )
    bottom = _TOP + _ROW * len(rows)
    parts = [
        *_axis(axis, bottom, len(rows)),
        *(_row(axis, row, _TOP + _ROW * i) for i, row in enumerate(rows)),
    ]
    said = "; ".join(f"{row.name}: {row.said()}, {_in_words(row)}" for row in rows)
    return chart(bottom + _BOTTOM, title, f"Times better than {than}: {said}.", *parts)


def _in_words(row: Bar) -> str:
    return {"better": "better", "worse": "worse", "open": "no difference shown"}[
        row.kind
    ]


def _axis(axis: Axis, bottom: float, rows: int) -> list[Markup]:
    middle = axis(1)
    parts = [
        label(middle - 6, 12, "◂ worse", "end", "dim"),
        label(middle + 6, 12, "better ▸", kind="dim"),
    ]
    for value in axis.ticks(times_short):
        place = axis(value)
        text = times_short(value)
        # A label at an end stays inside.
        half = text_width(text) / 2
        place_of_text = min(max(place, half), WIDTH - half)
        parts.append(_beside_bars(place, rows, "grid"))
        parts.append(label(place_of_text, bottom + 17, text, "middle", "dim"))
    parts.append(_beside_bars(middle, rows, "one"))
    parts.append(
        label(WIDTH / 2, bottom + 32, "times better (log scale)", "middle", "dim")
    )
    return parts


def _beside_bars(place: float, rows: int, kind: str) -> Markup:
    """Return an upright line that leaves out the names of rows."""
    tops = (_TOP + _ROW * i + 16 for i in range(rows))
    return path((f"M{number(place)} {number(top)}v{_ROW - 18}" for top in tops), kind)


def times_short(value: float) -> str:
    """Return a tick of an axis of factors: 0.5×, 2×, 1000×."""
    return f"{value:g}×"


def _row(axis: Axis, row: Bar, top: float) -> Markup:
    value = row.said()
    parts = [
        name_with_title(0, top + 13, row.name, WIDTH - text_width(value) - 10),
        label(WIDTH, top + 13, value, "end", "value"),
    ]
    if row.gain is not None:
        parts += _bar(axis, row, row.gain, top + 19)
    tip = f"{row.name}: {value}, {_in_words(row)}"
    tip += f" ({row.figures})" if row.figures and row.gain is not None else ""
    return element("g", element("title", tip), *parts, class_="mark")


def _bar(axis: Axis, row: Bar, gain: float, top: float) -> list[Markup]:
    one, place = axis(1), axis(gain)
    left, width = min(one, place), max(abs(place - one), 1.0)
    parts = [box(left, top, width, _BAR, f"bar {row.kind}")]
    if row.kind == "worse":
        parts.append(hatch(left, top, width, _BAR))
    if row.low is not None and row.high is not None:
        start, end, middle = axis(row.low), axis(row.high), top + _BAR / 2
        caps = "".join(
            f"M{number(x)} {number(middle - 4)}V{number(middle + 4)}"
            for x in (start, end)
        )
        across = f"M{number(start)} {number(middle)}H{number(end)}"
        parts += [path([across, caps], "halo"), path([across, caps], "whisker")]
    return parts


def legend(has_intervals: bool = True) -> Markup:
    """Return a chart that says how bars are read."""
    kinds = {
        "better": "better: its interval is above 1×",
        "worse": "worse: its interval is below 1×",
        "open": "no difference is shown",
    }
    if not has_intervals:
        kinds = {"better": "better", "worse": "worse", "open": "no difference"}
    parts: list[Markup] = []
    for i, (kind, said) in enumerate(kinds.items()):
        top = 8 + i * 26
        parts.append(box(2, top, 44, _BAR, f"bar {kind}"))
        if kind == "worse":
            parts.append(hatch(2, top, 44, _BAR))
        parts.append(label(58, top + 10, said))
    said = "Filled: better. Hatched: worse. An outline: no difference is shown."
    top = 8 + len(kinds) * 26
    if not has_intervals:
        return chart(top, "How to read the bars", said, *parts)
    across = f"M2 {top + 5}H46M2 {top + 1}v8M46 {top + 1}v8"
    parts += [path([across], "whisker"), label(58, top + 10, "95 % interval")]
    return chart(top + 22, "How to read the bars", said, *parts)
