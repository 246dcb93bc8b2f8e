"""Maps: mean against p99, and where radix helps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vllm_radix_bench.html.bars import times_short
from vllm_radix_bench.html.numbers import NONE, times
from vllm_radix_bench.html.scales import around_one
from vllm_radix_bench.html.svg import (
    FONT,
    WIDTH,
    box,
    chart,
    element,
    hatch,
    label,
    line,
    shortened,
    text_width,
)

_PLOT, _TOP = 230, 22
_QUADRANTS = ("only p99 better", "both better", "both worse", "only mean better")
_NAME = 150
"""Widest name in a plot."""
_CELL_HEIGHT, _LEAST_CELL = 30, 58

Box = tuple[float, float, float, float]


def mean_against_p99(
    title: str, points: Sequence[tuple[str, float, float]], than: str = "stock"
) -> Markup:
    """Return a chart of gains: the mean across, the slowest hundredth upwards.

    Args:
        title: of the chart.
        points: name, gain of the mean and gain of p99.
        than: what they are compared with.
    """
    if not points:
        return chart(40, title, "No figures.", label(0, 24, "No figures.", kind="dim"))
    top, bottom, right = _TOP, _TOP + _PLOT, WIDTH - 4
    up = around_one([y for *_, y in points], bottom, top, 36, 36)
    # Labels of an upright axis are above each other, and need less space than these.
    ticks = up.ticks(lambda value: "00000")
    left = max(text_width(times_short(value)) for value in (*ticks, 1)) + 10
    space = max(map(text_width, _QUADRANTS)) + 10
    across = around_one([x for _, x, _ in points], left, right, 60, space)
    parts: list[Markup] = [label(0, 12, "TTFT p99, times better", kind="dim")]
    for value in across.ticks(times_short):
        half = text_width(times_short(value)) / 2
        place = min(max(across(value), left + half), WIDTH - half)
        parts.append(line(across(value), top, across(value), bottom, "grid"))
        parts.append(label(place, bottom + 17, times_short(value), "middle", "dim"))
    for value in ticks:
        parts.append(line(left, up(value), right, up(value), "grid"))
        parts.append(label(left - 6, up(value) + 4, times_short(value), "end", "dim"))
    middle = (left + right) / 2
    parts.append(
        label(
            middle, bottom + 34, "mean TTFT, times better (log scales)", "middle", "dim"
        )
    )
    worse = box(left, up(1), right - left, bottom - up(1), "shade")
    parts += [worse, line(across(1), top, across(1), bottom, "one")]
    parts.append(line(left, up(1), right, up(1), "one"))
    marks = [(name, across(x), up(y), x, y) for name, x, y in points]
    # Marks, the lines at 1, and names of quadrants: other names stand beside them.
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y, *_ in marks]
    for number, name in enumerate(_QUADRANTS):
        ends = (across(1), right) if number % 2 else (left, across(1))
        reach = (top, up(1)) if number < 2 else (up(1), bottom)
        parts += _quadrant(name, ends, reach, taken)
    taken.append((across(1) - 1, top, across(1) + 1, bottom))
    taken.append((left, up(1) - 1, right, up(1) + 1))
    parts += _named(marks, taken, (left, top, right, bottom))
    said = "; ".join(f"{n}: mean {times(x)}, p99 {times(y)}" for n, x, y in points)
    return chart(bottom + 42, title, f"Times better than {than}: {said}.", *parts)


def _quadrant(
    name: str, ends: tuple[float, float], reach: tuple[float, float], taken: list[Box]
) -> Iterator[Markup]:
    """Yield the name of a quadrant, in a corner of it that is free."""
    width = text_width(name)
    if width > ends[1] - ends[0] - 8:
        return
    for base in (reach[0] + 15, reach[1] - 6, (reach[0] + reach[1]) / 2):
        for left in (ends[1] - width - 4, ends[0] + 5):
            place = (left, base - FONT + 1, left + width, base + 3)
            if not any(_meet(place, other) for other in taken):
                taken.append(place)
                yield label(left, base, name, kind="quadrant")
                return


def _named(
    points: Sequence[tuple[str, float, float, float, float]],
    taken: list[Box],
    inside: Box,
) -> Iterator[Markup]:
    """Yield marks and names; a name stands where nothing else does, or nowhere."""
    for name, x, y, mean, slow in points:
        tip = element("title", f"{name}: mean {times(mean)}, p99 {times(slow)}")
        kind = "better" if mean > 1 and slow > 1 else "worse"
        parts = [tip, element("circle", cx=x, cy=y, r=4.5, class_=f"point {kind}")]
        short = shortened(name, _NAME)
        for distance, left, base in _places(x, y, text_width(short)):
            place = (left, base - FONT + 1, left + text_width(short), base + 3)
            if _is_inside(place, inside) and not any(_meet(place, b) for b in taken):
                taken.append(place)
                if distance:
                    end = min(max(x, place[0]), place[2])
                    parts.append(line(x, y, end, min(max(y, place[1]), base), "leader"))
                parts.append(label(left, base, short))
                break
        yield element("g", *parts, class_="mark")


def _places(x: float, y: float, width: float) -> Iterator[tuple[bool, float, float]]:
    """Yield places of a name: whether it is far, its left end and its base line."""
    yield False, x + 8, y + 4
    yield False, x - 8 - width, y + 4
    yield False, x - width / 2, y - 8
    yield False, x - width / 2, y + 17
    for radius in range(18, 130, 8):
        for step in range(16):
            angle = step * math.pi / 8
            to_the = x + radius * math.cos(angle)
            left = to_the if math.cos(angle) >= 0 else to_the - width
            yield True, left, y + radius * math.sin(angle) + 4


def _is_inside(one: Box, other: Box) -> bool:
    return (
        one[0] >= other[0] + 2
        and one[1] >= other[1] + 1
        and one[2] <= other[2] - 2
        and one[3] <= other[3] - 1
    )


def _meet(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2]
        and other[0] < one[2]
        and one[1] < other[3]
        and other[1] < one[3]
    )


@dataclass(frozen=True)
class Cells:
    """What a map holds.

    Attributes:
        rows: names of the rows, from top to bottom.
        columns: names of the columns.
        gains: by row and column; what is not there was not run.
        row_title: of what the rows are.
        column_title: of what the columns are.
    """

    rows: list[str]
    columns: list[str]
    gains: dict[tuple[str, str], float | None]
    row_title: str
    column_title: str


def heat_map(title: str, cells: Cells, than: str = "stock") -> Markup:
    """Return a map of gains, a figure in every cell; what is worse is hatched.

    Args:
        title: of the map.
        cells: of it.
        than: what they are compared with.
    """
    names = max(text_width(row) for row in (*cells.rows, cells.row_title))
    left = min(max(names + 10, 40), 150)
    count = max(len(cells.columns), 1)
    # Many columns: the map is wider than a phone, and scrolls in its own box.
    across = max((WIDTH - left) / count, _LEAST_CELL)
    width = left + across * count
    top = 40
    parts: list[Markup] = [
        label(left + across * count / 2, 12, cells.column_title, "middle", "dim"),
        label(0, 30, shortened(cells.row_title, left - 6), kind="dim"),
    ]
    for number, column in enumerate(cells.columns):
        middle = left + across * (number + 0.5)
        parts.append(label(middle, 30, shortened(column, across - 4), "middle"))
    most = max((abs(math.log(g)) for g in cells.gains.values() if g), default=0.0)
    said = []
    for place, row in enumerate(cells.rows):
        y = top + place * _CELL_HEIGHT
        parts.append(label(left - 8, y + 20, shortened(row, left - 8), "end"))
        for number, column in enumerate(cells.columns):
            gain = cells.gains.get((row, column))
            x = left + across * number
            tip = (
                f"{cells.row_title} {row}, {cells.column_title} {column}: {times(gain)}"
            )
            said.append(tip)
            parts.append(_cell(x, y, across, gain, most, tip))
    height = top + _CELL_HEIGHT * len(cells.rows) + 4
    text = f"Times better than {than}. {'; '.join(said)}."
    return chart(height, title, text, *parts, width=width)


def _cell(
    x: float, y: float, width: float, gain: float | None, most: float, tip: str
) -> Markup:
    inner = (x + 1.5, y + 1.5, width - 3, _CELL_HEIGHT - 3)
    parts = [element("title", tip)]
    if not gain:
        parts.append(box(*inner, "cell none"))
    else:
        strength = abs(math.log(gain)) / most if most else 0.0
        kind = "better" if gain > 1.005 else "worse" if gain < 0.995 else "same"
        parts.append(
            box(*inner, f"cell {kind}", fill_opacity=f"{0.12 + 0.55 * strength:.2f}")
        )
        if kind == "worse":
            parts.append(hatch(*inner, 7))
    said = times(gain) if gain else NONE
    parts.append(label(x + width / 2, y + 20, said, "middle", "figure"))
    return element("g", *parts, class_="mark")
