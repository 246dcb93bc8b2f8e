"""Numbers of hybrid models that pages quote are those of the study."""

import re

import pytest

from support.pages import ROOT
from vllm_radix_bench.study.hybrid import ROOM, WAYS, run_cell, traffic_cells
from vllm_radix_bench.workloads.hybrid_loads import TRAFFIC

ROW = re.compile(r"\| (.+) \| (full\S+) \| (\S+) \| (.+ → .+) \| (.+ → .+) \|")
COLUMNS = ("backlog", "one by one")


@pytest.fixture(scope="module")
def runs():
    """The runs of the study's first part, by load and layout; ten seconds or two."""
    cells = traffic_cells(seed=0)
    return {(c.load, c.layout): run_cell((c, ("stock", "radix"))) for c in cells}


def change(run):
    tokens = [run["arms"][arm]["computed_tokens"] for arm in ("stock", "radix")]
    return " → ".join(f"{count:,}" for count in tokens)


def test_the_table_is_the_studys(runs):
    page = (ROOT / "docs" / "hybrid-models.md").read_text()
    found = [ROW.fullmatch(line) for line in page.splitlines()]
    rows = {(row[1], row[2]): row.groups()[2:] for row in found if row}
    assert rows.keys() == {(load, layout) for load in TRAFFIC for layout in ROOM}
    assert set(COLUMNS) == WAYS.keys()
    for (load, layout), (fewest, *shown) in rows.items():
        cells = [runs[f"{load}, {way}", layout] for way in COLUMNS]
        assert {f"{run['fewest']:,}" for run in cells} == {fewest}
        assert shown == [change(run) for run in cells]


def test_the_line_of_the_readme_is_the_studys(runs):
    text = " ".join((ROOT / "README.md").read_text().split())
    cells = [runs["documents, backlog", layout] for layout in ROOM]
    for run in cells:
        assert change(run) in text
    assert f"{cells[0]['fewest']:,} is the fewest possible" in text
    assert "python -m vllm_radix_bench.study hybrid --part traffic" in text
