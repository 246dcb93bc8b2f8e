"""Curves of arms: how first tokens are distributed, and hit rates over time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vllm_radix_bench.html.numbers import finite, seconds
from vllm_radix_bench.html.scales import Axis, of_times
from vllm_radix_bench.html.svg import (
    WIDTH,
    chart,
    element,
    label,
    line,
    number,
    path,
    shortened,
    spread,
    text_width,
)

STYLES = 6
"""Kinds of lines there are: dashes, and thickness."""
_LEFT, _BOTTOM, _PLOT = 44, 40, 150
_SAMPLE, _LEGEND = 30, 20
_MOST_POINTS = 250


@dataclass(frozen=True)
class Curve:
    """An arm's points.

    Attributes:
        name: of the arm.
        points: x and y, y being a share of 1.
        style: number of its kind of line, from 0.
    """

    name: str
    points: list[tuple[float, float]]
    style: int


def ttft_distribution(title: str, arms: dict[str, Sequence[object]]) -> Markup:
    """Return a chart: which share of requests has its first token within a time.

    Args:
        title: of the chart.
        arms: seconds to first token, by arm; in any order.
    """
    found = {name: sorted(_numbers(values)) for name, values in arms.items()}
    all_values = [value for values in found.values() for value in values]
    axis = of_times(all_values, _LEFT, WIDTH - 8)
    curves = [
        Curve(name, [(v, (i + 1) / len(values)) for i, v in enumerate(values)], style)
        for style, (name, values) in enumerate(found.items())
    ]

    def said(name: str, values: Sequence[float]) -> str:
        if not values:
            return f"{name}: no figures"
        half, slow = (values[round(s * (len(values) - 1))] for s in (0.5, 0.99))
        return f"{name}: half within {seconds(half)}, 99 % within {seconds(slow)}"

    words = "; ".join(said(name, values) for name, values in found.items())
    x_title = "time to first token (log scale)"
    return _plot(title, f"{words}.", curves, axis, _time, x_title,
                 "share of requests", steps=True)  # fmt: skip


def hit_rates(title: str, arms: dict[str, Sequence[Sequence[object]]]) -> Markup:
    """Return a chart of hit rates over time.

    Args:
        title: of the chart.
        arms: pairs of seconds and hit rate, by arm.
    """
    curves = []
    for style, (name, pairs) in enumerate(arms.items()):
        both = [(finite(x), finite(y)) for x, y in pairs]
        points = [(x, y) for x, y in both if x is not None and y is not None]
        curves.append(Curve(name, sorted(points), style))
    last = max((x for curve in curves for x, _ in curve.points), default=0.0)
    axis = Axis(0, last or 1.0, _LEFT, WIDTH - 16)

    def said(curve: Curve) -> str:
        if not curve.points:
            return f"{curve.name}: no figures"
        return f"{curve.name}: {curve.points[-1][1]:.0%} at the end"

    words = "; ".join(map(said, curves))
    text = _minutes if last >= 600 else _time
    return _plot(title, f"{words}.", curves, axis, text, "time since the start",
                 "hit rate until then", steps=False)  # fmt: skip


def _numbers(values: Iterable[object]) -> list[float]:
    found = (finite(value) for value in values)
    return [value for value in found if value is not None and value >= 0]


def _time(value: float) -> str:
    if value == 0:
        return "0"
    if value < 0.9995:
        return f"{value * 1e3:g} ms" if value >= 0.9995e-3 else f"{value * 1e6:g} µs"
    return f"{value:g} s" if value < 1e4 else f"{value / 3600:.3g} h"


def _minutes(value: float) -> str:
    return f"{value / 60:g} min" if value else "0"


def _plot(
    title: str,
    said: str,
    curves: Sequence[Curve],
    across: Axis,
    tick: Callable[[float], str],
    x_title: str,
    y_title: str,
    steps: bool,
) -> Markup:
    shown = [curve for curve in curves if curve.points]
    if not shown:
        return chart(40, title, "No figures.", label(0, 24, "No figures.", kind="dim"))
    legend, top = _legend(curves)
    top += 26
    bottom = top + _PLOT
    up = Axis(0, 1, bottom, top)
    parts = [*legend, label(0, top - 14, y_title, kind="dim")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(line(_LEFT, up(share), WIDTH - 4, up(share), "grid"))
        parts.append(label(_LEFT - 6, up(share) + 4, f"{share:.0%}", "end", "dim"))
    for value in across.ticks(tick):
        half = text_width(tick(value)) / 2
        place = min(max(across(value), half), WIDTH - half)
        parts.append(line(across(value), bottom, across(value), bottom + 4, "axis"))
        parts.append(label(place, bottom + 17, tick(value), "middle", "dim"))
    parts.append(line(_LEFT, bottom, WIDTH - 4, bottom, "axis"))
    parts.append(label((_LEFT + WIDTH) / 2, bottom + 34, x_title, "middle", "dim"))
    # The solid line below the dashed one: where they agree, both are seen.
    for curve in sorted(shown, key=lambda one: one.style != 1):
        parts.append(_curve(curve, across, up, steps))
    return chart(bottom + _BOTTOM, title, said, *parts)


def _curve(curve: Curve, across: Axis, up: Axis, steps: bool) -> Markup:
    chosen = [
        curve.points[i] for i in spread([x for x, _ in curve.points], _MOST_POINTS)
    ]
    places = [(across(x), up(y)) for x, y in chosen]
    x, y = places[0]
    commands = [f"M{number(x)} {number(up(0) if steps else y)}"]
    for x, y in places:
        commands.append(
            f"H{number(x)}V{number(y)}" if steps else f"L{number(x)} {number(y)}"
        )
    return element(
        "g",
        element("title", curve.name),
        path(commands, f"curve s{curve.style % STYLES}"),
        element("circle", cx=x, cy=y, r=3.5, class_=f"end s{curve.style % STYLES}"),
        class_="mark",
    )


def _legend(curves: Sequence[Curve]) -> tuple[list[Markup], float]:
    """Return samples of the lines with their names, and how high they stand."""
    parts: list[Markup] = []
    x, y = 0.0, 12.0
    for curve in curves:
        name = curve.name if curve.points else f"{curve.name} (no figures)"
        name = shortened(name, WIDTH - _SAMPLE - 8)
        width = _SAMPLE + 6 + text_width(name)
        if x and x + width > WIDTH:
            x, y = 0.0, y + _LEGEND
        style = f"curve s{curve.style % STYLES}"
        parts.append(line(x, y - 4, x + _SAMPLE, y - 4, style))
        parts.append(label(x + _SAMPLE + 6, y, name))
        x += width + 16
    return parts, y + 8
