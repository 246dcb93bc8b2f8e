"""Every kernel of a run on vLLM's CUDA path compiles for an H100; none is launched."""

from pathlib import Path

import arms
import pytest
import triton
from jobs import ENGINE, WORDS
from support.pretended_gpu import INSTALL, environment
from test_real_answers import Mix

pytestmark = [pytest.mark.cuda_path, pytest.mark.timeout(600)]

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
OURS = {"grouped_attention_kernel", "merge_partials_kernel"}
STAND_IN = {"rms_norm_kernel", "rotary_kernel", "silu_and_mul_kernel"}
VLLMS = {
    "kernel_unified_attention",
    "reshape_and_cache_kernel_flash",
    "_gumbel_sample_kernel",
    "_gather_block_tables_kernel",
}


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton ships no ptxas")
def test_every_kernel_of_a_run_compiles(model, logs, tmp_path):
    mix = Mix(20, vocabulary=WORDS)
    stem = mix.words(40)
    for _ in range(4):
        mix.add(stem + mix.words(5), max_tokens=4)
    mix.add(mix.words(120), max_tokens=2)
    settings = {
        "engine": {
            **ENGINE,
            "model": model,
            "dtype": "bfloat16",
            "async_scheduling": True,
        },
        "radix": {"attention": "grouped"},
        "before": [INSTALL, "engine_arm:always_group"],
        "report": "support.pretended_gpu.triton_driver:report",
    }
    cache = str(tmp_path / "triton")
    arm = arms.Arm(
        "compiled", settings, logs, environment("compile", TRITON_CACHE_DIR=cache)
    )
    try:
        arm.wait(180)
        got = arm.ask({"requests": mix.requests, "attention": True}, seconds=300)
    finally:
        arm.stop()
    assert got["requests"] == 5
    assert got["attention"]["grouped_steps"] > 0
    report = got["report"]
    found = set(report["compiled"])
    for kernels in (OURS, STAND_IN, VLLMS):
        assert kernels <= found, kernels - found
    assert report["launches"] > 50
