"""The committed table of what the kernels use, and a few rows of it built again."""

import json
from pathlib import Path

import aot
import pytest

ROOT = Path(__file__).parents[2]

TABLE = json.loads((ROOT / "kernels" / "aot.json").read_text())


def test_the_table_is_complete_and_nothing_spills():
    assert aot.problems(TABLE) == []
    built = {(name, variant) for name, rows in TABLE.items() for variant in rows}
    assert built == set(aot.jobs([]))


def test_a_table_that_spills_is_noticed():
    name = "bf16, heads of 128"
    good = TABLE["sm_90"][name]
    for change in (
        {"registers": 256},
        {"stack": 8},
        {"spills": 1},
        {"matrix": {"HMMA": 3}},
    ):
        assert len(aot.problems({"sm_90": {name: {**good, **change}}})) == 1


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "gfx942"])
def test_what_is_built_now_is_what_was_committed(architecture):
    name = "bf16, heads of 128"
    assert aot.build((architecture, name)) == TABLE[architecture][name]
