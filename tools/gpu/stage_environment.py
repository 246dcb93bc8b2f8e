"""Stage 0: the machine, two ceilings, and what the stand-in rests on."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import stand_in
import torch
from stage import Result, main, timed

VERSIONS = ("torch", "triton", "transformers", "numpy", "pydantic", "numba")
MODULES = ("vllm", "vllm_radix", "xgrammar", "msgspec", "zmq")


def versions() -> dict[str, Any]:
    """Return what is installed."""
    out: dict[str, Any] = {
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
    }
    for name in VERSIONS:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    out["missing"] = [name for name in MODULES if not importlib.util.find_spec(name)]
    return out


def device() -> dict[str, Any]:
    """Return what the device and its host are."""
    found = torch.cuda.get_device_properties(0)
    with open("/proc/cpuinfo") as lines:
        cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), "")
    return {
        "name": found.name,
        "sm": found.multi_processor_count,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "cpus": os.cpu_count(),
        "cpu": cpu,
    }


def smi() -> str:
    """Return the driver's version, clocks and memory."""
    fields = "name,driver_version,clocks.sm,clocks.mem,memory.total,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def copy_bandwidth() -> dict[str, float]:
    """Return the terabytes per second that a copy reads and writes."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "TB/s": 2 * source.numel() / timed(lambda: target.copy_(source)) / 1e12,
    }


def matmul() -> dict[str, float]:
    """Return the teraflops of a matrix product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return {"TFLOP/s": 2 * 8192**3 / timed(lambda: a @ b) / 1e12}


def off(got: torch.Tensor, right: torch.Tensor) -> float:
    """Return the length of the difference over the length."""
    wide, other = got.double(), right.double()
    return float((wide - other).norm() / other.norm())


def operations(where: str = "cuda", hidden: int = 4096) -> dict[str, float]:
    """Return how far the stand-in's kernels are from the same in torch.

    Args:
        where: device to run on.
        hidden: width of the rows.
    """
    kind, out = torch.bfloat16, {}
    x = torch.randn(77, hidden, device=where, dtype=kind)
    weight = torch.randn(hidden, device=where, dtype=kind)
    result = torch.empty_like(x)
    stand_in.rms_norm(result, x, weight, 1e-5)
    right = stand_in.plain_norm(x.double(), None, weight.double(), 1e-5)
    out["rms_norm"] = off(result, right)
    residual, both = torch.randn_like(x), x.clone()
    total = residual.double()
    right = stand_in.plain_norm(x.double(), total, weight.double(), 1e-5)
    stand_in.fused_add_rms_norm(both, residual, weight, 1e-5)
    out["fused_add_rms_norm"] = off(both, right)
    out["residual"] = off(residual, total)
    gated = torch.randn(77, 2 * hidden, device=where, dtype=kind)
    result = torch.empty(77, hidden, device=where, dtype=kind)
    stand_in.silu_and_mul(result, gated)
    out["silu_and_mul"] = off(result, stand_in.plain_silu_and_mul(gated.double()))
    query = torch.randn(77, 3 * hidden, device=where, dtype=kind)[:, :hidden]
    positions = torch.randint(0, 4096, (77,), device=where)
    frequency = 1e4 ** (-torch.arange(0, 128, 2, device=where) / 128)
    angle = torch.arange(4096, device=where)[:, None] * frequency
    cos_sin = torch.cat([angle.cos(), angle.sin()], -1).to(kind)
    for neox in (True, False):
        turned = query.clone()
        right = stand_in.plain_rotary(
            positions, turned.double().view(77, -1, 128), cos_sin, neox
        )
        stand_in.rotary_embedding(positions, turned, None, 128, cos_sin, neox)
        out[f"rotary, neox {neox}"] = off(turned.view(77, -1, 128), right)
    return out


def pinned_view() -> dict[str, Any]:
    """Return whether the device sees what the host writes to pinned memory."""
    pinned = torch.arange(1000, dtype=torch.int32).pin_memory()
    view = stand_in.get_cuda_view_from_cpu_tensor(pinned)
    pinned[7] = -5
    torch.cuda.synchronize()
    same = view.data_ptr() == pinned.data_ptr()
    return {"device": str(view.device), "seen": int((view * 1)[7]), "same": same}


def capture() -> dict[str, float]:
    """Return what a weak reference taken while a graph is captured reads, as vLLM's."""
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    x @ x
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ x
        weak = stand_in.weak_ref_tensor(y)
    graph.replay()
    torch.cuda.synchronize()
    return {"value": float(weak[0, 0]), "expected": 64.0}


def run() -> bool:
    """Run the stage; return whether all that is needed is there."""
    result = Result("0-environment")
    for piece in (versions, smi, device, copy_bandwidth, matmul):
        result.attempt(piece.__name__, piece)
    made = result.attempt("operations", operations) or {"none": 1.0}
    view = result.attempt("pinned_view", pinned_view) or {}
    caught = result.attempt("capture", capture) or {}
    good = max(made.values()) < 1e-2 and view.get("seen") == -5
    return bool(good and caught.get("value") == caught.get("expected"))


if __name__ == "__main__":
    main(run)
