"""``tools/gpu``: the bundle is built, and its stages run on the pretended GPU.

Sizes are tiny and nothing is timed; the device machine runs the same scripts.
"""

import json
import subprocess
import sys
import tarfile

import bundle
import pytest
import stand_in
import torch

from support.pretended_gpu import INSTALL, ROOT, environment, plain_attention
from vllm_radix_kernels.interpreter import interpreted

pytestmark = [pytest.mark.cuda_path, pytest.mark.timeout(900)]


def test_the_stand_ins_kernels_compute_what_torch_does(monkeypatch):
    import stage_environment

    monkeypatch.setattr(stand_in, "PLAIN", False)
    torch.manual_seed(0)
    with interpreted():
        found = stage_environment.operations("cpu", hidden=256)
    assert len(found) == 6
    assert max(found.values()) < 5e-3, found


def test_a_wrong_stand_in_is_seen(monkeypatch):
    import stage_environment

    right = stand_in.plain_rotary
    monkeypatch.setattr(stand_in, "plain_rotary", lambda p, *rest: right(p + 1, *rest))
    found = stage_environment.operations("cpu", hidden=256)
    # On a CPU both sides are plain, and both are wrong alike.
    assert max(found.values()) < 5e-3
    monkeypatch.setattr(stand_in, "PLAIN", False)
    with interpreted():
        found = stage_environment.operations("cpu", hidden=256)
    assert found["rotary, neox True"] > 0.1


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Return where a bundle of this Python was built and its stages have run."""
    folder = tmp_path_factory.mktemp("kit")
    python = ".".join(map(str, sys.version_info[:2]))
    made = bundle.build(folder / "bundle", python, preset=0)
    assert [path.name for path in made] == ["packages.tar.xz", "vllm.tar.xz"]
    before = f"{INSTALL} {plain_attention.INSTALL}"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "gpu" / "run.py"),
            *"1234",
            f"--bundle={folder / 'bundle'}",
        ],
        env=environment(
            RADIX_GPU_WORK=str(folder / "work"),
            OUT=str(folder / "out"),
            RADIX_GPU_INTERPRET="1",
            RADIX_GPU_BEFORE=before,
            RADIX_GPU_ARMS_SMOKE="stock radix grouped",
            RADIX_GPU_WORKLOADS="few-shot",
        ),
        capture_output=True,
        text=True,
    )
    (folder / "out" / "output.txt").write_text(done.stdout + done.stderr)
    return folder / "out"


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_the_bundle_is_complete(out):
    def names(archive):
        with tarfile.open(out.parent / "bundle" / archive) as packed:
            return packed.getnames()

    packages, vllm = names("packages.tar.xz"), names("vllm.tar.xz")
    pins = bundle.PINS.read_text().split()
    infos = {name.partition("/")[0].lower().replace("_", "-") for name in packages}
    for pin in pins:
        name, _, number = pin.lower().replace("_", "-").partition("==")
        assert f"{name}-{number}.dist-info" in infos, pin
    assert "vllm/_C_stable_libtorch.py" in vllm
    assert not [name for name in vllm if name.endswith(".so")]
    assert any(name.startswith("vllm_radix-") for name in packages)


def test_every_stage_says_that_all_is_well(out):
    text = (out / "output.txt").read_text()
    assert text.rstrip().endswith("1:0 2:0 3:0 4:0"), text[-4000:]


def test_the_kernels_are_compared(out):
    found = result(out, "1-correct")
    assert found["bad"] == []
    assert found["count"] == "6 of 6"


def test_the_smoke_compares_grouped_answers(out):
    found = result(out, "3-smoke")
    assert found["good"] is True
    assert found["up"]["grouped"]["scheduler"] == "AsyncRadixScheduler"
    for name in ("radix", "grouped"):
        compared = found[f"few-shot {name} against stock"]
        assert compared["compared"] > 5
        assert not compared["wrong"]
    assert found["few-shot grouped"]["attention"]["grouped_steps"] > 3


def test_the_comparison_has_both_arms(out):
    table = result(out, "4-ab")["table"]
    assert set(table) == {
        "few-shot burst 1",
        "few-shot burst 2",
        "few-shot arrivals at 1.2x",
    }
    stock, radix, _ = table["few-shot burst 1"]["computed_prompt_tokens"]
    assert 0 < radix < stock
