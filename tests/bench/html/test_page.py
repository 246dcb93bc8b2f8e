"""Pages as text: what they say of a report."""

import html
import json
import re

import pytest

from support import ab_reports as reports
from vllm_radix_bench.html import ab
from vllm_radix_bench.html.page import render_ab

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def titles(text):
    return re.findall(r"<svg[^>]*><title>(.*?)</title>", text)


@pytest.mark.parametrize("name", reports.ALL)
def test_a_page_refers_to_nothing(name):
    text = render_ab(reports.ALL[name]())
    # Names are escaped, so that what looks like markup is.
    assert not re.search(r"<(?:script|link|img|iframe|a|object|form)\b", text)
    assert not re.search(r"""(?:url\(|@import|\b(?:src|href)=["'])""", text)
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in text


def test_a_page_says_what_the_report_says():
    report = reports.ordinary()
    text = html.unescape(render_ab(report)).replace("\u00a0", " ")
    assert f"<h1>{report['sentence']}</h1>" in text
    for said in ("68,880 → 16,531", "2.94× (2.85 to 3.09)", "18.0 % → 80.3 %",
                 "EPYC 7B13, 2 cores, 24 GB", "5,120 tokens: 160 blocks of 32",
                 "--max-num-seqs 16", "5, in turns; both servers up at once",
                 "2026-11-26 19:30:00 UTC", "120 alike"):  # fmt: skip
        assert said in text, said
    assert text.count("✓ held") == 2 and "✗ failed" not in text


def test_a_page_holds_the_report_but_for_the_pieces():
    report = reports.errors()
    text = render_ab(report)
    raw = html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[1])
    kept = json.loads(raw, parse_constant=lambda name: pytest.fail(name))
    assert kept.keys() == report.keys() - {"pieces"}
    assert kept["workloads"][0] == report["workloads"][0]


def test_every_workload_has_its_charts():
    assert titles(render_ab(reports.ordinary())) == [
        "Prompt tokens computed", "Time to first token, mean",
        "Time to first token, p99", "Requests per second", "Mean against p99",
        "How to read the bars",
        *(f"{chart}: {name}" for name in reports.SHAPES
          for chart in ("Time to first token", "Hit rate over time")),
    ]  # fmt: skip


def test_failed_checks_and_errors_are_told():
    text = html.unescape(render_ab(reports.errors()))
    assert text.count("✗ failed") == 2
    assert "83 compared, 4 differ, 1 beyond doubt" in text
    assert "not compared" in text


def test_a_matrix_has_maps_and_short_names():
    page = ab.page_of(reports.matrix())
    assert [one.title for one in page.maps] == [
        "few-shot: prompt tokens computed", "few-shot: mean TTFT", "few-shot: TTFT p99",
    ]  # fmt: skip
    assert page.sections[0].title == "250 blocks · 0.5/s"
    assert all(section.is_folded for section in page.sections)


def test_what_did_not_vary_is_in_no_name():
    report = reports.ordinary()
    for one in report["workloads"]:
        one["cell"] = {"blocks": None, "rate": 2.0}
    page = ab.page_of(report)
    assert page.maps == []
    assert [one.title for one in page.sections] == list(reports.SHAPES)


def test_two_workloads_in_a_matrix_keep_their_names():
    report = reports.matrix()
    more = reports.matrix()["workloads"]
    for one in more:
        one["name"] = "chat"
    page = ab.page_of({**report, "workloads": [*report["workloads"], *more]})
    assert len(page.maps) == 6
    assert page.sections[-1].title == "chat · 2,000 blocks · 4/s"


def test_times_that_are_noise_are_outlines_and_said_to_be():
    page = ab.page_of(reports.noise())
    assert "Times are noise here" in page.warnings[-1]
    said = ["Times of the control are noise."]
    assert ab.page_of({**reports.noise(), "warnings": said}).warnings == said
    tokens, *times = (str(one.svg) for one in page.overview[:4])
    assert 'class="bar better"' in tokens
    for chart in times:
        assert 'class="bar open"' in chart
        assert 'class="bar better"' not in chart and 'class="bar worse"' not in chart


def test_without_intervals_no_time_is_called_better():
    page = ab.page_of(reports.without_intervals())
    mean = page.overview[1]
    assert "too few rounds" in mean.note
    assert 'class="bar better"' not in str(mean.svg)


def test_tenants_are_a_table():
    page = ab.page_of(reports.hostile())
    tenants = page.sections[0].more[-1]
    assert tenants.title == "Tenants, stock → radix"
    assert [row[0] for row in tenants.rows] == [*reports.HOSTILE, "no name"]
    assert tenants.rows[0][3] == "2.00×"


@pytest.mark.parametrize(
    "left", [[], ["workloads"], ["setup", "machine"], ["versions", "verdicts"]]
)
def test_a_report_that_lacks_parts_still_gives_a_page(left):
    """As one of a run that was stopped does."""
    report = reports.ordinary()
    for name in left:
        del report[name]
    assert "</html>" in render_ab(report)
    for one in report.get("workloads", ()):
        one |= {"times": {}, "counts": {}, "ttft_seconds": {}}
    assert "</html>" in render_ab(report)
