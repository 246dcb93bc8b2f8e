"""Every kernel of a run on vLLM's CUDA path compiles for an H100; none is launched."""

import re
from pathlib import Path

import arms
import pytest
import stage_smoke
import triton
from cuda_path.jobs import ENGINE, WORDS

from support.pretended_gpu import INSTALL, environment
from support.prompts import RequestMix

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


needs_ptxas = pytest.mark.skipif(not PTXAS.exists(), reason="Triton ships no ptxas")


def compile_a_run(model, logs, cache, name, dtype, env):
    """Return the result of a run of grouped attention whose kernels are compiled."""
    mix = RequestMix(20, vocabulary=WORDS)
    stem = mix.words(40)
    for _ in range(4):
        mix.add(stem + mix.words(5), max_tokens=4)
    mix.add(mix.words(120), max_tokens=2)
    settings = {
        "engine": {
            **ENGINE,
            "model": model,
            "dtype": dtype,
            "async_scheduling": True,
        },
        "env": env,
        "radix": {"attention": "grouped"},
        "before": [INSTALL, "engine_arm:always_group"],
        "report": "support.pretended_gpu.triton_driver:report",
    }
    process = environment("compile", TRITON_CACHE_DIR=str(cache))
    process.pop("TRITON_F32_DEFAULT", None)
    arm = arms.Arm(name, settings, logs, process)
    try:
        arm.wait(180)
        return arm.ask({"requests": mix.requests, "attention": True}, seconds=300)
    finally:
        arm.stop()


@needs_ptxas
def test_every_kernel_of_a_run_compiles(model, logs, tmp_path):
    got = compile_a_run(model, logs, tmp_path, "compiled", "bfloat16", {})
    assert got["requests"] == 5
    assert got["attention"]["grouped_steps"] > 0
    report = got["report"]
    found = set(report["compiled"])
    for kernels in (OURS, STAND_IN, VLLMS):
        assert kernels <= found, kernels - found
    assert report["launches"] > 50


@needs_ptxas
@pytest.mark.parametrize(("env", "exact"), [({}, False), (stage_smoke.EXACT, True)])
def test_float32_dots_are_exact_where_the_smoke_runs(model, logs, tmp_path, env, exact):
    """Without the variable, vLLM's kernel multiplies in TF32 and ours does not."""
    compile_a_run(model, logs, tmp_path, f"compiled {exact}", "float32", env)
    in_tf32 = {
        kernel: any(
            re.search(r"mma[^\n]*tf32", path.read_text())
            for path in tmp_path.rglob(f"{kernel}.ptx")
        )
        for kernel in ("kernel_unified_attention", "grouped_attention_kernel")
        if list(tmp_path.rglob(f"{kernel}.ptx"))
    }
    assert in_tf32 == {
        "kernel_unified_attention": not exact,
        "grouped_attention_kernel": False,
    }
