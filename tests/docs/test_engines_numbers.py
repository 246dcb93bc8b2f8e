"""The table of real routers is that of the run that is kept."""

import json
import re

from support.pages import ROOT
from vllm_radix_bench.study.real_routers import Row, text_table

KEPT = ROOT / "benchmarks" / "results" / "engines" / "2026-11-26-routers.json"
ORDERS = KEPT.with_name("2026-11-27-orders.json")
PAGE = (ROOT / "docs" / "more-than-one-engine.md").read_text()


def kept():
    rows = json.loads(KEPT.read_text())["rows"]
    return [Row(**{**row, "requests": tuple(row["requests"])}) for row in rows]


def test_the_table_is_the_run_s():
    assert text_table(kept()) in PAGE


def test_numbers_of_the_text_are_in_the_table_or_those_of_the_orders():
    text, table = PAGE.partition("- Placement decides")[2], text_table(kept())
    quoted = re.findall(r"\d+,\d{3}", text.partition("### Traps")[0])
    assert len(quoted) >= 6
    orders = {f"{row['computed']:,}" for row in json.loads(ORDERS.read_text())["rows"]}
    assert [n for n in quoted if n not in table and n not in orders] == []


def test_the_least_and_most_of_each_order_are_told():
    told = {"random": (13224, 16678), "in turn": (9044, 13482), "by bank": (5614, 5924)}
    rows = json.loads(ORDERS.read_text())["rows"]
    for order, (least, most) in told.items():
        assert f"{least:,}-{most:,}" in PAGE
        found = [
            row["computed"]
            for row in rows
            if (row["routing"], row["order"]) == ("kv_aware", order)
        ]
        assert (min(found), max(found)) == (least, most)
