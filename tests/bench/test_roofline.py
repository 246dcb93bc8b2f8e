"""The roofline model: what it predicts, and that the planner chooses by it."""

import subprocess
import sys

import pytest

from vllm_radix.attention.cost import DEVICES
from vllm_radix_bench.roofline import SHAPES, plot, predict


@pytest.mark.parametrize("architecture", [a for a in DEVICES if a != "interpreter"])
def test_the_planner_takes_what_the_model_favours(architecture):
    margin = DEVICES[architecture].margin
    for shape in SHAPES:
        made = predict(shape, architecture)
        assert made.grouped == (made.speedup > margin), shape.name


def test_an_h100_gains_where_many_rows_share_long_prefixes_and_only_there():
    made = {shape.name: predict(shape) for shape in SHAPES}
    assert made["decode 32 x 4k"].speedup > 3
    assert made["decode 128 x 4k"].speedup > made["decode 32 x 4k"].speedup
    assert made["extend 8 x 4 over 2k"].grouped
    for name in (
        "nothing shared, 32 x 4k",
        "prefill 4 x 2k over 4k",
        "prefill 1 x 8k",
        "decode 2 x 512",
        "decode 32 x 256, own 4k",
    ):
        assert not made[name].grouped, name
        assert made[name].speedup < 1.05


def test_the_command_prints_every_shape_and_draws(tmp_path):
    command = [sys.executable, "-m", "vllm_radix_bench.roofline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("grouped") + done.stdout.count("vLLM's (ours") >= len(
        SHAPES
    )
    plot("sm_90", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    wrong = [*command, "--architecture", "sm_1"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'sm_1'" in done.stderr
