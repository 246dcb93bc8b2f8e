"""The table of real routers is that of the run that is kept."""

import json
import re

from support.pages import ROOT
from vllm_radix_bench.study.real_routers import Row, text_table

KEPT = ROOT / "benchmarks" / "results" / "engines" / "2026-11-26-routers.json"
PAGE = (ROOT / "docs" / "more-than-one-engine.md").read_text()


def kept():
    rows = json.loads(KEPT.read_text())["rows"]
    return [Row(**{**row, "requests": tuple(row["requests"])}) for row in rows]


def test_the_table_is_the_run_s():
    assert text_table(kept()) in PAGE


def test_numbers_of_the_text_are_in_the_table():
    text, table = PAGE.partition("- Placement decides")[2], text_table(kept())
    quoted = re.findall(r"\d+,\d{3}", text.partition("### Traps")[0])
    assert len(quoted) >= 6
    assert [number for number in quoted if number not in table] == []
