"""``tools/gpu``: the stages for hybrid models, as far as they run without a GPU.

The toy with windows runs on the pretended GPU. The kernels of states do not run in the
interpreter: what the stage makes of their results is tested with made ones.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import run
import stage_hybrid
import torch

from support.pretended_gpu import INSTALL, ROOT, environment, plain_attention

pytestmark = [pytest.mark.cuda_path, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Return where the stages have run."""
    folder = tmp_path_factory.mktemp("hybrid-kit")
    for name in ("7", "8"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "gpu" / run.STAGES[name][0])],
            env=environment(
                RADIX_GPU_WORK=str(folder / "work"),
                OUT=str(folder / "out"),
                RADIX_GPU_INTERPRET="1",
                RADIX_GPU_BEFORE=f"{INSTALL} {plain_attention.INSTALL}",
            ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder / "out"


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_windows_are_compared_with_hits_inside_blocks(out):
    found = result(out, "7-hybrid")
    windows = found["windows"]
    assert found["good"] is True and windows["good"] is True
    assert windows["up"]["radix"]["manager"] == "HybridKVCacheManager"
    assert windows["up"]["stock"]["manager"] == "KVCacheManager"
    assert windows["answers"]["compared"] == 11
    assert any(n % 32 for n in windows["cached"].values())
    assert windows["effect of a block"] > 100 * windows["distance"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("answers", "wrong"), ["original"]),
        (("distance",), 0.1),
        (("effect of a block",), 0.001),
        (("radix", "held_blocks"), 1),
        (("radix", "copies"), 0),
        (("radix", "computed_prompt_tokens"), 10**6),
        (("up", "radix", "async"), False),
        (("up", "stock", "v2_runner"), False),
    ],
)
def test_what_is_wrong_with_a_toy_is_seen(out, path, value):
    found = copy.deepcopy(result(out, "7-hybrid")["windows"])
    assert stage_hybrid.is_right("windows", found)
    part = found
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert not stage_hybrid.is_right("windows", found)


def test_states_must_have_been_handed_out_and_gone_on_from(out):
    found = copy.deepcopy(result(out, "7-hybrid")["windows"])
    found["radix"]["checkpoints"], found["cached"]["after"] = 2, 512
    assert stage_hybrid.is_right("falcon_h1", found)
    found["radix"]["checkpoints"] = 0
    assert not stage_hybrid.is_right("falcon_h1", found)
    found["radix"]["checkpoints"], found["cached"]["after"] = 2, 0
    assert not stage_hybrid.is_right("falcon_h1", found)


def test_a_delta_net_must_go_on_at_multiples_of_its_grain(out):
    found = copy.deepcopy(result(out, "7-hybrid")["windows"])
    found["cached"] = {"one": 320, "two": 0}
    assert stage_hybrid.is_right("qwen3_next", found)
    found["cached"]["two"] = 96
    assert not stage_hybrid.is_right("qwen3_next", found)


@pytest.mark.parametrize("toy", ["falcon_h1", "qwen3_next"])
def test_drafts_are_a_setting_of_the_same_toy(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_hybrid, "WORK", tmp_path)
    plain, drafts = (
        stage_hybrid.settings(name, {})["engine"] for name in (toy, f"{toy}+drafts")
    )
    assert drafts["speculative_config"]["num_speculative_tokens"] == 3
    assert "speculative_config" not in plain
    configs = [Path(one["model"], "config.json").read_text() for one in (plain, drafts)]
    assert configs[0] == configs[1]


def in_chunks(size, q, k, v, g, beta, initial_state, output_final_state):
    """A state and outputs that round once in each chunk, as the kernel does."""
    state, parts = initial_state, []
    for chunk in v.float().split(size, dim=1):
        state = (state + chunk.sum(1)[..., None] * 1e-3).half().float()
        parts.append(state.sum().expand(*chunk.shape))
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize(("size", "good"), [(64, True), (128, False)])
def test_the_kernels_grain_is_found(size, good):
    def rule(**arguments):
        return in_chunks(size, **arguments)

    found = stage_hybrid.delta_rule(rule, "cpu", tokens=256, heads=1, size=16)
    assert stage_hybrid.grain_is_right(found) is good
    # Between chunks other bits come out, so that equal ones prove something.
    assert found["float32"]["65"] > 0


def test_the_comparison_has_both_arms(out):
    table = result(out, "8-hybrid-time")["table"]
    assert "documents burst 1" in table
    stock, radix, _ = table["documents burst 1"]["computed_prompt_tokens"]
    assert 0 < radix <= stock
