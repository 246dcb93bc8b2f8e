"""Triton with a driver that compiles for sm_90 and launches nothing."""

from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget

compiled: set[str] = set()
"""Names of kernels that were compiled to machine code so far."""

launches = 0
"""Launches so far, none of which computed anything."""


def report() -> dict[str, Any]:
    """Return what was compiled, and how often it was launched; for an arm's job."""
    return {"compiled": sorted(compiled), "launches": launches}


class Launcher:
    """Takes a compiled kernel's launches."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        global launches
        launches += 1


class Utils:
    """What Triton asks of a driver while it loads a kernel."""

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        """Return an H100's limits; the clocks are nobody's."""
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    @staticmethod
    def load_binary(name: str, binary: bytes, *_: Any) -> tuple[int, ...]:
        """Note a kernel; return handles, registers and spills that stand for it."""
        assert binary[:4] == b"\x7fELF", f"{name} is no machine code"
        compiled.add(name)
        return 1, 1, 0, 0, 1024


class Driver:
    """Triton's active driver."""

    utils, launcher_cls = Utils, Launcher

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, *_: Any) -> int:
        """Return the only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors are."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return torch's module for the device."""
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        """Return the type; launchers are not built."""
        return name

    def get_benchmarker(self) -> Any:
        """Return a timer that finds all configurations alike."""
        return lambda _, quantiles=None: [1.0] * len(quantiles or [1])

    def get_empty_cache_for_benchmark(self) -> None:
        """Return nothing to flush."""

    def clear_cache(self, *_: Any) -> None:
        """Flush nothing."""


def install() -> None:
    """Make the driver Triton's, and NVIDIA the one backend that is active."""
    for name, backend in backends.items():
        backend.driver.is_active = staticmethod(lambda name=name: name == "nvidia")
    triton.runtime.driver.set_active(Driver())
