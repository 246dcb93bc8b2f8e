"""What the stages share: where results go, saved after each piece of work."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", "/tmp/radix-gpu/out"))
WORK = Path(os.environ.get("RADIX_GPU_WORK", "/tmp/radix-gpu"))
"""Where bundles are unpacked, and caches, logs and models are written."""

LOGS = WORK / "logs"
INTERPRET = os.environ.get("RADIX_GPU_INTERPRET") == "1"
"""Whether kernels are interpreted and sizes tiny: on a machine without a GPU."""

BEFORE = os.environ.get("RADIX_GPU_BEFORE", "").split()
"""What arms call before they import vLLM; the pretended GPU, where it is one."""


def limit(seconds: float) -> float:
    """Return the stage's own limit: ``RADIX_GPU_LIMIT``, or what is given."""
    return float(os.environ.get("RADIX_GPU_LIMIT", seconds))


class Result:
    """A JSON file of named pieces; each is saved as soon as it is known.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.path = OUT / f"{name}.json"
        self.data: dict[str, Any] = {}
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the stage started."""
        return time.monotonic() - self.start

    def put(self, name: str, value: Any, show: bool = True) -> None:
        """Keep a piece, and print its beginning."""
        self.data[name] = value
        self.path.write_text(json.dumps(self.data, indent=1, default=str) + "\n")
        if show:
            self.say(f"{name}: {json.dumps(value, default=str)[:400]}")

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{self.seconds:6.1f}s] {text}", flush=True)

    def attempt(self, name: str, function: Callable[..., Any], **named: Any) -> Any:
        """Call, and keep what comes of it; of an error its text and end of trace."""
        try:
            value = function(**named)
        except Exception as error:
            tail = traceback.format_exc().splitlines()[-8:]
            self.put(name, {"error": repr(error)[:600], "trace": tail})
            return None
        self.put(name, value)
        return value


def timed(call: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Return the median seconds of a call on the device, by events."""
    import torch

    for _ in range(warm_up):
        call()
    out = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        out.append(start.elapsed_time(end) / 1e3)
    return sorted(out)[repeats // 2]


def main(stage: Callable[[], bool]) -> None:
    """Run a stage; exit with 1 if it fails or says that something is wrong."""
    try:
        good = stage()
    except Exception:
        traceback.print_exc()
        good = False
    sys.exit(0 if good else 1)
