"""Charts as pure functions: figures, axes, and what stands where."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from vllm_radix_bench.html.bars import Bar, bars, legend
from vllm_radix_bench.html.curves import hit_rates, ttft_distribution
from vllm_radix_bench.html.maps import Cells, heat_map, mean_against_p99
from vllm_radix_bench.html.numbers import amount, gain, inverse, seconds, times, whole
from vllm_radix_bench.html.scales import Axis, around_one, of_times
from vllm_radix_bench.html.svg import (
    WIDTH,
    clean,
    element,
    hatch,
    shortened,
    spread,
    text_width,
)

SPACE = "\u00a0"
SVG = "{http://www.w3.org/2000/svg}"


def parsed(chart):
    return ElementTree.fromstring(str(chart))


def of_class(chart, name):
    return [e for e in parsed(chart).iter() if name in (e.get("class") or "").split()]


def texts(chart):
    return [(e[0].tail if len(e) else e.text) for e in parsed(chart).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 s"), (4e-6, "4.00 µs"), (0.0412, "41.2 ms"), (0.412, "412 ms"),
     (1.236, "1.24 s"), (59.94, "59.9 s"), (599, "599 s"), (601, "10.0 min"),
     (20_000, "5.56 h"), (math.nan, "–"), (math.inf, "–"), (None, "–"), (True, "–"),
     ("7", "–")],
)  # fmt: skip
def test_seconds_have_a_unit_that_fits(value, said):
    assert seconds(value) == said.replace(" ", SPACE)


@pytest.mark.parametrize(
    ("value", "said"),
    [(2.94117, "2.94×"), (0.0912, "0.091×"), (0.001, "0.001×"), (1e-9, "<0.001×"),
     (0, "0×"), (1234.5, "1,234×"), (12.34, "12.3×"), (None, "–"), (math.nan, "–")],
)  # fmt: skip
def test_factors_have_three_digits_and_no_powers(value, said):
    assert times(value) == said


def test_amounts_have_their_unit():
    assert amount(128.4, "tokens/s") == f"128{SPACE}tokens/s"
    assert amount(0.5, "s") == f"500{SPACE}ms" and amount(5.43, "") == "5.43"
    assert whole(12_345.4) == "12,345" and whole(None) == amount(None, "s") == "–"


@pytest.mark.parametrize(
    ("stock", "radix", "better", "value"),
    [(100, 25, "lower", 4.0), (100, 25, "higher", 0.25), (0, 0, "lower", 1.0),
     (5, 0, "lower", None), (0, 5, "higher", None), (None, 5, "lower", None),
     (math.nan, 5, "lower", None), (-1, 5, "lower", None)],
)  # fmt: skip
def test_a_gain_is_above_one_where_radix_is_better(stock, radix, better, value):
    assert gain(stock, radix, better) == value


def test_a_ratio_becomes_a_gain():
    assert inverse(0.25) == 4 and inverse(1.5, "higher") == 1.5
    assert [inverse(one) for one in (0, -1, None, math.nan)] == [None] * 4


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low", [1e-6, 0.003, 0.7, 12])
@pytest.mark.parametrize("factor", [1.03, 1.7, 4.2, 37, 1e4, 1e9])
def test_ticks_are_round_inside_and_apart(low, factor, log):
    axis = Axis(low, low * factor, 40, 330, log)

    def text(value):
        return f"{value:g} s"

    ticks = axis.ticks(text)
    assert 1 <= len(ticks) <= 12
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)
    for one, other in pairwise(ticks):
        room = axis(other) - axis(one)
        assert room >= (text_width(text(one)) + text_width(text(other))) / 2


def test_a_short_logarithmic_axis_has_round_ticks():
    axis = of_times([0.0645, 0.145], 44, 332)
    ticks = axis.ticks(lambda value: f"{value * 1e3:g} ms")
    assert ticks == [0.08, 0.1, 0.12]


def test_places_beyond_an_axis_are_at_its_ends():
    axis = Axis(0.01, 100, 0, 200, log=True)
    assert [axis(v) for v in (0, -3, 0.01, 1, 1e9)] == pytest.approx(
        [0, 0, 0, 100, 200]
    )


@pytest.mark.parametrize(
    "values", [[1.0], [0.001], [1000.0], [0.001, 1000], [1.0001], [1e-30], []]
)
def test_one_is_never_at_the_edge(values):
    axis = around_one(values, 0, 340, 60, 70)
    assert 59.9 <= axis(1) <= 270.1
    assert all(0 < axis(v) < 340 for v in values if v > 1e-6)


def test_times_of_zero_do_not_stretch_the_axis():
    axis = of_times([0.0, 0.1, 0.2], 0, 100)
    assert 0.05 < axis.low < 0.1 and axis(0.0) == 0
    assert of_times([], 0, 100).low > 0


@pytest.mark.parametrize(
    ("bar", "kind"),
    [
        (Bar("a", 2.0, 1.5, 2.5), "better"),
        (Bar("a", 0.8, 0.7, 0.9), "worse"),
        (Bar("a", 1.1, 0.9, 1.3), "open"),
        (Bar("a", 2.0), "open"),
        (Bar("a", 2.0, is_sure=True), "better"),
        (Bar("a", 0.5, is_sure=True), "worse"),
        (Bar("a", 1.001, is_sure=True), "open"),
        (Bar("a", 2.0, 1.5, 2.5, is_noise=True), "open"),
        (Bar("a", None), "open"),
    ],
)
def test_a_bar_is_filled_only_where_a_difference_is_shown(bar, kind):
    assert bar.kind == kind
    chart = bars("title", [bar])
    drawn = of_class(chart, "bar")
    assert [one.get("class") for one in drawn] == [f"bar {kind}"] * (
        bar.gain is not None
    )
    assert bool(of_class(chart, "hatch")) == (kind == "worse")
    assert bool(of_class(chart, "whisker")) == bar.has_interval


def test_better_is_to_the_right_of_one():
    chart = bars(
        "title", [Bar("good", 2.0, is_sure=True), Bar("bad", 0.5, is_sure=True)]
    )
    good, bad = of_class(chart, "bar")
    (one,) = of_class(chart, "one")
    middle = float(re.match(r"M([\d.]+)", one.get("d"))[1])
    assert float(good.get("x")) == pytest.approx(middle, abs=0.1)
    assert float(bad.get("x")) + float(bad.get("width")) == pytest.approx(
        middle, abs=0.2
    )
    assert float(good.get("width")) == pytest.approx(float(bad.get("width")), abs=0.2)


def test_charts_are_told_to_readers_who_do_not_see_them():
    chart = parsed(bars("Tokens", [Bar("chat", 2.0, 1.5, 2.5), Bar("x", None)]))
    assert chart.get("role") == "img"
    assert [chart[0].tag, chart[1].tag] == [f"{SVG}title", f"{SVG}desc"]
    assert chart[0].text == "Tokens"
    said = "chat: 2.00× (1.50 to 2.50), better; x: no figure, no difference shown."
    assert chart[1].text == f"Times better than stock: {said}"


def test_no_chart_has_an_id_nor_refers_to_one():
    charts = [
        bars("t", [Bar("a", 0.5, is_sure=True)]),
        legend(),
        ttft_distribution("t", {"stock": [1.0, 2.0], "radix": [0.5]}),
        mean_against_p99("t", [("a", 1.0, 2.0)]),
    ]
    for chart in charts:
        assert not re.search(r"\bid=|url\(|href|xlink:|<script", str(chart))


def test_a_distribution_steps_up_to_all_requests():
    chart = ttft_distribution("t", {"stock": [4.0, 1.0, 2.0, 3.0], "radix": [0.5]})
    stock = next(e for e in of_class(chart, "curve") if "s0" in e.get("class")
                 and e.tag.endswith("path"))  # fmt: skip
    heights = [float(v) for v in re.findall(r"V([\d.]+)", stock.get("d"))]
    assert len(heights) == 4 and heights == sorted(heights, reverse=True)
    steps = [a - b for a, b in pairwise(heights)]
    assert steps == pytest.approx([37.5] * 3)
    said = parsed(chart)[1].text
    assert f"radix: half within 500{SPACE}ms" in said


@pytest.mark.parametrize("values", [[], [math.nan], [None, -1.0]])
def test_what_has_no_figures_says_so(values):
    assert texts(ttft_distribution("t", {"stock": values, "radix": []})) == [
        "No figures."
    ]
    assert texts(hit_rates("t", {"stock": [], "radix": []})) == ["No figures."]
    assert texts(bars("t", [])) == texts(mean_against_p99("t", [])) == ["No figures."]
    one = ttft_distribution("t", {"stock": values, "radix": [1.0]})
    assert "stock (no figures)" in texts(one) and len(of_class(one, "end")) == 1


def test_many_points_are_thinned_with_both_ends():
    assert spread(range(1000), 4) == [0, 333, 666, 999] and spread([5, 6], 4) == [0, 1]
    chart = ttft_distribution("t", {"stock": range(1, 5000), "radix": []})
    path = next(e for e in of_class(chart, "curve") if e.tag.endswith("path"))
    assert path.get("d").count("H") == 250


def test_names_of_points_stand_apart():
    points = [(f"workload {i}", 1 + i / 10, 1.2) for i in range(8)]
    found = parsed(mean_against_p99("t", points))
    named = [g for g in found.iter(f"{SVG}g") if g.find(f"{SVG}text") is not None]
    boxes = []
    for group in named:
        text = group.find(f"{SVG}text")
        x, y = float(text.get("x")), float(text.get("y"))
        boxes.append((x, y, x + text_width(text.text)))
    assert len(boxes) >= 6
    for i, (x, y, end) in enumerate(boxes):
        for left, base, right in boxes[:i]:
            assert abs(y - base) >= 11 or end <= left or right <= x


def test_quadrants_are_named():
    points = [("a", 0.5, 0.5), ("b", 2.0, 2.0)]
    chart = mean_against_p99("t", points)
    names = {e.text for e in of_class(chart, "quadrant")}
    assert names == {
        "only p99 better", "both better", "both worse", "only mean better",
    }  # fmt: skip


def test_a_map_has_a_figure_in_every_cell_and_hatches_what_is_worse():
    gains = {("1", "a"): 2.0, ("1", "b"): 0.5, ("2", "a"): 1.0, ("2", "b"): None}
    chart = heat_map("t", Cells(["1", "2"], ["a", "b"], gains, "blocks", "rate"))
    assert [e.text for e in of_class(chart, "figure")] == [
        "2.00×",
        "0.50×",
        "1.00×",
        "–",
    ]
    kinds = [e.get("class").split()[1] for e in of_class(chart, "cell")]
    assert kinds == ["better", "worse", "same", "none"]
    assert len(of_class(chart, "hatch")) == 1


def test_a_wide_map_keeps_its_text_readable():
    columns = [str(i) for i in range(20)]
    gains = {("1", column): 2.0 for column in columns}
    chart = parsed(heat_map("t", Cells(["1"], columns, gains, "blocks", "rate")))
    width = float(chart.get("viewBox").split()[2])
    assert width > 3 * WIDTH and chart.get("style") == f"min-width:{width:.0f}px"


def test_hatching_stays_inside():
    numbers = [
        float(v) for v in re.findall(r"[\d.]+", hatch(10, 20, 33, 11).split('"')[1])
    ]
    across, upright = numbers[::2], numbers[1::2]
    assert len(across) > 10
    assert min(across) >= 10 and max(across) <= 43
    assert min(upright) >= 20 and max(upright) <= 31


def test_text_is_escaped_cleaned_and_cut():
    made = element("text", '<b>"&', title='"><b>')
    assert str(made) == ('<text title="&#34;&gt;&lt;b&gt;">&lt;b&gt;&#34;&amp;</text>')
    assert clean("a\x00b\x1bc\u202ed\ne") == "a\ufffdb\ufffdc\ufffdd\ne"
    assert shortened("short", 200) == "short"
    cut = shortened("a long name " * 20, 100)
    assert cut.endswith("…") and 80 < text_width(cut) <= 100
    assert shortened("W", 1) == "…"
