"""Torch that says it has an H100, and puts what is made for it on the CPU."""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
MEMORY = 80 << 30


class Properties:
    """What ``torch.cuda.get_device_properties`` returns for an H100 SXM."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = MEMORY
    is_integrated = False
    gcnArchName = ""
    L2_cache_size = 50 << 20
    warp_size = 32
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    shared_memory_per_block_optin = 232448
    uuid = "0"


class Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Record nothing: everything is done when its call returns."""

    wait = synchronize = record

    def query(self) -> bool:
        """Return that it has happened."""
        return True

    def elapsed_time(self, _: "Event") -> float:
        """Return a millisecond; no time is pretended."""
        return 1.0


class Stream:
    """A stream on which everything is done at once."""

    device, device_index, device_type = CPU, 0, 1
    cuda_stream = stream_id = priority = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Wait for nothing."""

    wait_event = synchronize = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        """Return the event."""
        return event or Event()

    def query(self) -> bool:
        """Return that all is done."""
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def always(value: Any) -> Any:
    """Return a function of its own that takes anything and returns ``value``."""
    return lambda *_, **__: value


_STREAM = Stream()

# A CPU build of torch lacks these; torch.cuda imports or calls them by name.
_BINDINGS = {
    "_cuda_getAllocatorBackend": "native",
    "_cuda_getDevice": 0,
    "_cuda_setDevice": None,
    "_cuda_getDeviceCount": 1,
    "_cuda_maybeExchangeDevice": 0,
    "_cuda_exchangeDevice": 0,
    "_cuda_getCurrentRawStream": 0,
    "_cuda_getCurrentStream": (0, 0, 1),
    "_cuda_getDefaultStream": (0, 0, 1),
    "_cuda_setStream": None,
    "_cuda_synchronize": None,
    "_cuda_emptyCache": None,
    "_cuda_isCurrentStreamCapturing": False,
    "_cuda_hasPrimaryContext": True,
    "_cuda_init": None,
    "_cuda_memoryStats": {},
    "_cuda_resetPeakMemoryStats": None,
}

_CUDA = {
    "Stream": Stream,
    "Event": Event,
    "current_stream": always(_STREAM),
    "default_stream": always(_STREAM),
    "set_stream": always(None),
    "stream": lambda _: contextlib.nullcontext(),
    "StreamContext": lambda _: contextlib.nullcontext(),
    "synchronize": always(None),
    "set_device": always(None),
    "current_device": always(0),
    "device_count": always(1),
    "_device_count_nvml": always(1),
    "is_available": always(True),
    "is_initialized": always(True),
    "init": always(None),
    "_lazy_init": always(None),
    "get_device_properties": always(Properties),
    "get_device_capability": always((9, 0)),
    "get_device_name": always(Properties.name),
    "mem_get_info": always((MEMORY - (1 << 30), MEMORY)),
    "empty_cache": always(None),
    "manual_seed": always(None),
    "manual_seed_all": always(None),
    "memory_stats": always({}),
    "max_memory_allocated": always(0),
    "memory_allocated": always(0),
    "memory_reserved": always(0),
    "reset_peak_memory_stats": always(None),
    "is_current_stream_capturing": always(False),
    "current_blas_handle": always(0),
    "set_sync_debug_mode": always(None),
    "get_sync_debug_mode": always(0),
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": always(None),
}

_ACCELERATOR = {
    "current_accelerator": always(torch.device("cuda")),
    "is_available": always(True),
    "device_count": always(1),
    "synchronize": always(None),
    "empty_cache": always(None),
    "set_device_index": always(None),
    "current_device_index": always(0),
    "current_stream": always(_STREAM),
    "set_stream": always(None),
    "empty_host_cache": always(None),
    "get_memory_info": always((MEMORY - (1 << 30), MEMORY)),
    "memory_stats": always({}),
    "max_memory_allocated": always(0),
    "memory_allocated": always(0),
    "memory_reserved": always(0),
    "max_memory_reserved": always(0),
    "reset_peak_memory_stats": always(None),
}

# Methods of tensors that mean nothing on a CPU, and what they return.
_METHODS = {
    "pin_memory": lambda tensor: tensor,
    "cuda": lambda tensor: tensor,
    "is_pinned": lambda _: True,
    "record_stream": lambda _: None,
}


def on_cpu(value: Any) -> Any:
    """Return the CPU for the pretended device, anything else as it is."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return CPU
    return value


class OnCpu(TorchFunctionMode):
    """Runs on the CPU whatever is asked of the pretended device.

    Args:
        zeroed: fill memory that nobody has written. Where kernels do not run, what
            they were to write is read as indices.
    """

    def __init__(self, zeroed: bool) -> None:
        super().__init__()
        self._zeroed = zeroed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` with the device replaced."""
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            return _METHODS[name](args[0])
        kwargs = dict(kwargs or {})
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        out = func(*map(on_cpu, args), **kwargs)
        if self._zeroed and name in (
            "empty",
            "empty_like",
            "new_empty",
            "empty_strided",
        ):
            out.zero_()
        return out


def install(zeroed: bool) -> None:
    """Change torch for the rest of the process."""
    for name, value in _BINDINGS.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, always(value))
    for name, function in _CUDA.items():
        setattr(torch.cuda, name, function)
    for name, function in _ACCELERATOR.items():
        setattr(torch.accelerator, name, function)
    # Without the mode, too: some of vLLM's threads do not have it.
    torch.Tensor.is_pinned = lambda self, *_, **__: True
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    OnCpu(zeroed).__enter__()
