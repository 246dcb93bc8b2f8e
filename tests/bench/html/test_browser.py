"""Pages in a real browser: every chart is drawn, nothing is loaded, all is readable."""

import re
import shutil
import subprocess
import sys

import pytest
import report_picture
from setup_env import HOW_TO_INSTALL_CHROMIUM

from support import ab_reports as reports
from vllm_radix.cli import main
from vllm_radix_bench.html.page import render_ab
from vllm_radix_bench.html.svg import text_width

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason=HOW_TO_INSTALL_CHROMIUM
)

PHONE, DESK = 390, 1200
LONG_ARM = 'radix:{"policy": "fcfs", "sub_block": false, "eviction": "lru"}'
NAMES = [*reports.ALL, "replay"]
LEAST_CHARTS = {name: len(make()["workloads"]) for name, make in reports.ALL.items()}
LEAST_CHARTS["replay"] = 7
MEASURE = """() => {
  const shown = (e) => e.getClientRects().length > 0;
  const place = (e) => { const b = e.getBoundingClientRect();
    return [b.left, b.top, b.right, b.bottom]; };
  return [...document.querySelectorAll('svg.chart')].map((svg) => ({
    name: svg.querySelector('title').textContent,
    said: svg.querySelector('desc').textContent,
    shown: shown(svg),
    place: place(svg),
    scale: svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
    marks: [...svg.querySelectorAll('.bar, .curve, .point, .cell, .whisker')]
      .filter(shown).length,
    bars: [...svg.querySelectorAll('.bar')].map(place),
    texts: [...svg.querySelectorAll('text')].map((text) => ({
      text: [...text.childNodes].filter((n) => n.nodeType === 3)
        .map((n) => n.textContent).join(''),
      place: place(text),
      size: parseFloat(getComputedStyle(text).fontSize),
    })),
  }));
}"""
OPEN_ALL = (
    "() => document.querySelectorAll('details').forEach((d) => { d.open = true; })"
)


@pytest.fixture(scope="module")
def chromium():
    with report_picture.browser() as made:
        yield made


@pytest.fixture
def open_page(chromium, tmp_path):
    """Return a function: it opens a page, and fails on requests and messages."""
    heard, tabs = [], []

    def open_one(text, width=DESK, **settings):
        path = tmp_path / f"{len(tabs)}.html"
        path.write_text(text, encoding="utf-8")
        own = path.as_uri()
        tab = chromium.new_page(viewport={"width": width, "height": 844}, **settings)
        tabs.append(tab)

        def answer(route):
            if route.request.url == own:
                return route.continue_()
            heard.append(f"request: {route.request.url}")
            return route.abort()

        tab.route("**/*", answer)
        tab.on("console", lambda message: heard.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: heard.append(f"error: {error}"))
        tab.goto(own)
        return tab

    yield open_one
    for tab in tabs:
        tab.close()
    assert heard == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every page, by name: those of reports, and one of a replay."""
    page = tmp_path_factory.mktemp("replayed") / "r.html"
    words = ["replay", "--workload", "agents", "--pressure", "3", "--load", "1.5"]
    words += ["--blocks", "100", "200", "--html", str(page)]
    words += ["--output", str(page.with_suffix(".json"))]
    assert main([*words, "--arms", "stock", "radix", LONG_ARM, "apc-off"]) == 0
    made = {name: render_ab(make()) for name, make in reports.ALL.items()}
    return {**made, "replay": page.read_text()}


def meet(one, other):
    """Whether two boxes share more than a pixel each way."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    upright = min(one[3], other[3]) - max(one[1], other[1])
    # A line of text is less high than its box, by the space for letters like g and Å.
    return across > 1 and upright > 4


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", NAMES)
def test_every_chart_is_drawn_and_readable(pages, open_page, name, width):
    tab = open_page(pages[name], width)
    tab.evaluate(OPEN_ALL)
    charts = tab.evaluate(MEASURE)
    assert len(charts) >= 6 + LEAST_CHARTS[name]
    for chart in charts:
        assert chart["shown"] and chart["name"] and len(chart["said"]) > 10, chart
        left, top, right, bottom = chart["place"]
        assert right - left > 200 and bottom - top > 20
        texts = chart["texts"]
        empty = [one["text"] for one in texts] == ["No figures."]
        assert empty or chart["marks"], chart["name"]
        for one in texts:
            assert one["size"] * chart["scale"] >= 11, one
            assert one["place"][0] >= left - 1 and one["place"][2] <= right + 1, one
            assert not any(meet(one["place"], bar) for bar in chart["bars"]), one
        for i, one in enumerate(texts):
            for other in texts[:i]:
                assert not meet(one["place"], other["place"]), (
                    chart["name"], one["text"], other["text"],
                )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_page_never_scrolls_sideways(pages, open_page, name):
    tab = open_page(pages[name])
    tab.evaluate(OPEN_ALL)
    for width in (320, PHONE, 719, 721, 1079, 1081, DESK):
        tab.set_viewport_size({"width": width, "height": 844})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, width


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_a_figure_that_is_none(pages, open_page, name):
    tab = open_page(pages[name])
    tab.evaluate(OPEN_ALL)
    text = tab.evaluate(
        "() => { document.querySelector('pre').remove(); "
        "return document.body.textContent; }"
    )
    assert re.findall(r"\b(?:nan|NaN|None|inf|Infinity|undefined|null)\b", text) == []


def test_names_from_traces_stay_text(pages, open_page):
    tab = open_page(pages["hostile"])
    tab.evaluate(OPEN_ALL)
    found = tab.evaluate(
        "[...document.querySelectorAll('script, img, b, iframe, object, link, a')]"
        ".map((e) => e.outerHTML)"
    )
    assert found == []
    text = tab.inner_text("body")
    for name in (reports.HOSTILE[0], "{{ 7 * 7 }} &amp;", reports.HOSTILE[4]):
        assert name in text
    assert "\u202e" not in text and "\x1b" not in text


def test_the_browser_would_refuse_to_load_or_run_anything(pages, chromium, tmp_path):
    """The page forbids it itself: what is slipped into it is stopped."""
    evil = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x'>"
    path = tmp_path / "evil.html"
    path.write_text(pages["ordinary"].replace("<main>", f"<main>{evil}"))
    tab = chromium.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("requestfinished", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    assert tab.title() != "run" and asked == [path.as_uri()]
    assert len([one for one in said if "Content Security Policy" in one]) == 2
    tab.close()


@pytest.mark.parametrize("name", ["ordinary", "many", "matrix", "replay"])
def test_paper_shows_all_that_a_click_shows(pages, open_page, name):
    tab = open_page(pages[name])
    tab.emulate_media(media="print", color_scheme="dark")
    charts = tab.evaluate(MEASURE)
    assert [chart["name"] for chart in charts if not chart["shown"]] == []
    tables = tab.evaluate(
        "[...document.querySelectorAll('table')].map("
        "(t) => [t.getBoundingClientRect().height, t.closest('details') !== null])"
    )
    assert any(folded for _, folded in tables)
    assert min(height for height, _ in tables) > 10
    # No ink is spent on a dark page, nor paper on the JSON.
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(255, 255, 255)"
    assert not tab.is_visible("pre")
    assert tab.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("settings", [{}, {"forced_colors": "active"}])
def test_arms_and_verdicts_differ_without_colour(pages, open_page, settings):
    tab = open_page(pages["ordinary"], **settings)
    lines = tab.evaluate(
        "['.curve.s0', '.curve.s1'].map((s) => "
        "{ const c = getComputedStyle(document.querySelector(s));"
        "  return [c.strokeDasharray, c.strokeWidth]; })"
    )
    (dashed, thin), (solid, thick) = lines
    assert dashed != "none" and solid == "none"
    assert float(thick.removesuffix("px")) > float(thin.removesuffix("px"))
    bars = tab.evaluate(
        "[...document.querySelectorAll('.bar')].map((b) => [b.classList[1], "
        "b.nextElementSibling?.classList[0] === 'hatch', getComputedStyle(b).fill])"
    )
    hatched = {kind for kind, is_hatched, _ in bars if is_hatched}
    assert hatched == {"worse"} and {kind for kind, *_ in bars} > hatched
    fills = {kind: fill for kind, _, fill in bars}
    assert fills["better"] != fills["open"]


def contrast(one, other):
    def light(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(pages, open_page, scheme):
    """WCAG 2.2's contrast: 4.5 for text, 3 for lines."""
    tab = open_page(pages["ordinary"], color_scheme=scheme)
    colours = tab.evaluate(
        "Object.fromEntries([['.curve.s0', 'stroke'], ['.curve.s1', 'stroke'],"
        " ['.bar.better', 'fill'], ['.bar.worse', 'stroke'], ['.dim', 'fill'],"
        " ['.chart text', 'fill'], ['figure', 'backgroundColor'], ['.note', 'color'],"
        " ['.verdicts strong', 'color'], ['.about', 'color'],"
        " ['body', 'backgroundColor']].map(([s, p]) => "
        "[s, getComputedStyle(document.querySelector(s))[p]]))"
    )
    card, page = colours.pop("figure"), colours.pop("body")
    assert contrast(colours.pop(".about"), page) >= 4.5
    for name, colour in colours.items():
        text = name in (".dim", ".chart text", ".note", ".verdicts strong")
        assert contrast(colour, card) >= (4.5 if text else 3), (name, colour)


def test_text_is_no_wider_than_the_layout_takes_it_for(pages, open_page):
    tab = open_page(pages["ordinary"])
    samples = ["few-shot", "2.94× (2.85 to 3.09)", "WWWMMM", "only mean better", "速い",
               "illicit fjords", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "500 ms",
               "abcdefghijklmnopqrstuvwxyz"]  # fmt: skip
    for sample in samples:
        width = tab.evaluate(
            "(said) => {"
            " const text = document.querySelector('.chart text:not(.value)');"
            " text.textContent = said; return text.getComputedTextLength(); }",
            sample,
        )
        assert width <= text_width(sample) + 0.5, sample


def test_a_picture_is_taken(pages, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "docs" / "report.png"
    page.write_text(pages["ordinary"])
    words = [sys.executable, report_picture.__file__, str(page), str(picture)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and str(picture) in done.stdout, done.stderr
    taken = picture.read_bytes()
    assert taken.startswith(b"\x89PNG") and 20_000 < len(taken) < 200_000
    words[2] = str(tmp_path / "gone.html")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "gone.html is no file" in done.stderr
