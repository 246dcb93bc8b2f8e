"""Pretend, from here on; to be called before vLLM is imported."""

import contextlib
import os
from types import SimpleNamespace
from typing import Any

from support.pretended_gpu import MODE, torch_cuda, triton_driver

# Kept: a generator that is collected runs its end.
_entered = contextlib.ExitStack()


def install() -> None:
    """Make this process one that has an H100, as far as vLLM can see.

    Raises:
        ValueError: the environment names no mode; see ``environment``.
    """
    mode = os.environ.get(MODE)
    if mode not in ("interpret", "compile"):
        raise ValueError(f"{MODE} is {mode!r}, not interpret or compile")
    torch_cuda.install(zeroed=mode == "compile")
    triton_driver.install()
    _change_vllm(interpret=mode == "interpret")
    if mode == "interpret":
        _interpret()
    else:
        _tiles_of_the_device()


def _change_vllm(interpret: bool) -> None:
    """Change what vLLM asks the machine, and nothing of how it works."""
    from vllm.third_party import pynvml

    _pretend_nvml(pynvml)
    from vllm.platforms import cuda

    # Custom operations are registered for where the tensors are.
    cuda.CudaPlatformBase.dispatch_key = "CPU"
    cuda.CudaPlatformBase.dist_backend = "gloo"
    from vllm import _C_stable_libtorch as stand_in

    stand_in.PLAIN = interpret
    stand_in.as_cuda = lambda tensor, owner: tensor.view_as(tensor)
    import torch.distributed

    start = torch.distributed.init_process_group

    def start_gloo(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        return start(*args, **{**kwargs, "backend": "gloo"})

    torch.distributed.init_process_group = start_gloo
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.worker import gpu_worker

    # It imports torchvision, and warms up other models' kernels.
    gpu_worker.kernel_warmup = lambda *_, **__: None
    if interpret:
        # vLLM cuts small batches up for 132 processors that are not here, which
        # takes an interpreter ten times as long.
        triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0


def _pretend_nvml(nvml: Any) -> None:
    properties = torch_cuda.Properties
    total, used = torch_cuda.MEMORY, 1 << 30
    memory = SimpleNamespace(total=total, free=total - used, used=used)
    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": (properties.major, properties.minor),
        "nvmlDeviceGetName": properties.name,
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": memory,
    }.items():
        setattr(nvml, name, torch_cuda.always(value))


def _interpret() -> None:
    """Run all kernels in the project's interpreter, until the process ends."""
    from vllm_radix_kernels import interpreter

    # vLLM passes pointers as integers, to memory that no argument shows.
    interpreter._touch = lambda *_, **__: None
    _entered.enter_context(interpreter.interpreted())


def _tiles_of_the_device() -> None:
    """Let our kernels be compiled with an H100's tiles, wherever the tensors are."""
    from vllm_radix_kernels import tiles

    tiles.architecture_of = torch_cuda.always("sm_90")
