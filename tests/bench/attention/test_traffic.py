"""Counted bytes are the model's, and as many fewer as is said."""

import pytest

from vllm_radix.attention.cost import DEVICES
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_bench.attention.batches import PAGE, Shape, make_batch
from vllm_radix_bench.attention.traffic import SHAPES, count, plot, ratios, show

pytestmark = pytest.mark.interpreted

SMALL = {
    "decode": Shape(6, 1, 192, 1, 4, 1, tail=16, head_size=32),
    "extend": Shape(4, 4, 192, 1, 4, 1, tail=16, head_size=32),
    "levels": Shape(8, 1, 192, 2, 4, 1, tail=16, head_size=32),
    "nothing": Shape(3, 1, 64, 0, 4, 1, tail=16, head_size=32),
}


@pytest.fixture(scope="module")
def rows():
    return {name: count(shape) for name, shape in SMALL.items()}


def test_both_kernels_load_what_the_model_says(rows):
    for name, row in rows.items():
        assert row["stock"] == row["stock_model"], name
        assert row["ours"] == row["ours_model"], name
        assert row["grouped"] == (name != "nothing")


def test_sharing_loads_less_and_nothing_shared_not_more(rows):
    assert ratios(rows["decode"])[0] > 4
    assert ratios(rows["extend"])[0] > 2.5
    assert ratios(rows["nothing"]) == (1.0, 1.0)
    assert all(ratios(row)[1] >= 1 / 1.02 for row in rows.values())


@pytest.mark.parametrize(
    ("name", "least"),
    [("decode: 32 x 1 over 4k", 5.0), ("extend: 8 x 4 over 2k", 2.0)],
)
def test_the_sizes_that_are_promised(name, least):
    """By the model, which the counts above equal; `make traffic` counts these too."""
    import torch

    shape = SHAPES[name]
    batch = make_batch(shape, torch.device("cpu"))
    limits = Limits(shape.layer, DEVICES["sm_90"], PAGE, tile_rows=64)
    plan = AttentionPlanner(limits).propose(*batch.host)
    theirs = plan.stock_work.loaded * shape.layer.token_bytes
    ours = plan.work.loaded * shape.layer.token_bytes
    partials = plan.work.partials * shape.layer.partial_bytes
    assert theirs / (ours + partials) >= least


def test_table_and_plot(rows, tmp_path):
    assert show(rows).row_count == len(rows)
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
