"""A pretended H100: vLLM's CUDA path on a machine that has no GPU.

A process that starts with ``environment()`` and calls ``install.install()`` before it
imports vLLM runs vLLM's CUDA platform: model runner V2, asynchronous scheduling, the
Triton attention backend. Its tensors live on the CPU. Kernels are

- interpreted (``interpret``): answers are right, steps take tenths of a second;
- compiled for sm_90 and not launched (``compile``): answers mean nothing.

Not pretended: time, memory that runs out, several streams at once. What a race on the
device would break, this cannot show.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".gpu-path"
MODE = "PRETENDED_GPU_MODE"
"""Environment variable: ``interpret`` or ``compile``."""

INSTALL = "support.pretended_gpu.install:install"
"""For an arm's ``before``; see ``tools/gpu/engine_arm.py``."""

_TOOLS = ROOT / "tools" / "gpu"


def environment(mode: str = "interpret", **more: str) -> dict[str, str]:
    """Return a process's environment that pretends; the overlay is made if missing.

    Args:
        mode: ``interpret`` or ``compile``.
        more: further variables; ``PYTHONPATH`` is added to what is needed.
    """
    if str(_TOOLS) not in sys.path:
        sys.path.append(str(_TOOLS))
    from overlay import cached_overlay

    paths = [
        str(cached_overlay(CACHE)),
        str(ROOT / "tests"),
        str(_TOOLS),
        more.pop("PYTHONPATH", ""),
        os.environ.get("PYTHONPATH", ""),
    ]
    out = {
        **os.environ,
        MODE: mode,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "CUDA_VISIBLE_DEVICES": "0",
        **more,
    }
    # vLLM's own helpers interpret where they see it; the other mode compiles.
    out.pop("TRITON_INTERPRET", None)
    if mode == "interpret":
        out["TRITON_INTERPRET"] = "1"
    return out
