"""Measures implementations of attention on batches, one after the other.

Timed on the device by events, in turns: `cold` with caches flushed before each call,
as a layer finds them whose weights and activations went by; `warm` right after a call
of its own. Launches are queued behind a pause, so that the host's time is in no figure.
Interpreted, where there is no GPU, bytes are counted and nothing is timed.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vllm_radix.attention.cost import DEVICES, loaded_bytes, seconds
from vllm_radix_bench.attention.batches import PAGE, Shape, make_batch
from vllm_radix_bench.attention.implementations import (
    IMPLEMENTATIONS,
    OURS,
    TOLERANCE,
    VLLM,
    Implementation,
    Row,
    check,
    gather,
)
from vllm_radix_kernels.grouped_attention import grouped_attention_reference
from vllm_radix_kernels.interpreter import Traffic, interpreted
from vllm_radix_kernels.tiles import architecture_of, table_name

WARM_UP, PAUSE = 3, 1_000_000
"""Rounds that are not counted, and cycles that launches queue behind."""


class Clock:
    """Times calls on a GPU by events; the host's time is not in them.

    Args:
        device: to time on.
        cache_size: bytes of its last-level cache.
    """

    def __init__(self, device: torch.device, cache_size: float) -> None:
        size = max(256 << 20, int(2 * cache_size))
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def _start(self) -> Any:
        # The device waits until the launches of the call are queued.
        torch.cuda._sleep(PAUSE)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _pair(self, call: Callable[[], torch.Tensor]) -> tuple[Any, Any]:
        start, end = self._start(), torch.cuda.Event(enable_timing=True)
        call()
        end.record()
        return start, end

    def measure(
        self, every: list[Implementation], repeats: int
    ) -> list[dict[str, Row]]:
        """Return the seconds of each, cold and warm, taken in turns."""
        events: list[list[tuple[Any, Any]]] = [[] for _ in every]
        for number in range(WARM_UP + repeats):
            for place in range(len(every)):
                one = (place + number) % len(every)
                self._flush.zero_()
                cold = self._pair(every[one].call)
                warm = self._pair(every[one].call)
                if number >= WARM_UP:
                    events[one] += [cold, warm]
            torch.cuda.synchronize()
        out = []
        for pairs in events:
            times = [start.elapsed_time(end) / 1e3 for start, end in pairs]
            out.append({"cold_s": spread(times[::2]), "warm_s": spread(times[1::2])})
        return out


def spread(times: list[float]) -> Row:
    """Return the median and the range."""
    return {"median": median(times), "min": min(times), "max": max(times)}


def time_row(shape: Shape, device: torch.device, clock: Clock, repeats: int) -> Row:
    """Return a timed row of the result."""
    batch = make_batch(shape, device)
    present, absent = gather(batch)
    expected = None
    for one in present:
        result = check(batch, one, expected)
        expected = result if expected is None else expected
    peaks = DEVICES[table_name(architecture_of(device))]
    out: dict[str, Row] = {}
    for one, times in zip(present, clock.measure(present, repeats), strict=True):
        out[one.name] = {"status": "measured", **one.notes, **times}
        if one.work is not None:
            cold, size = times["cold_s"]["median"], loaded_bytes(shape.layer, one.work)
            predicted = seconds(peaks, shape.layer, one.work)
            out[one.name] |= {
                "bytes": size,
                "bytes_per_s": size / cold,
                "predicted_s": predicted,
                "of_model": predicted / cold,
            }
    speedup: Row = {"declined": OURS in absent, "predicted": 1.0}
    speedup |= {"cold": 1.0, "warm": 1.0}
    if OURS in out:
        mine, theirs = out[OURS], out[VLLM]
        speedup["predicted"] = theirs["predicted_s"] / mine["predicted_s"]
        for name in ("cold", "warm"):
            mine_s, theirs_s = mine[f"{name}_s"], theirs[f"{name}_s"]
            speedup[name] = theirs_s["median"] / mine_s["median"]
    return {**asdict(shape), "contenders": out | absent, "speedup": speedup}


@contextmanager
def on_cpu(traffic: Traffic | None = None) -> Iterator[None]:
    """Interpret kernels; idle rows of vLLM's tiles may divide by zero."""
    with interpreted(traffic), np.errstate(all="ignore"):
        yield


def interpret_row(shape: Shape) -> Row:
    """Return a row of what kernels compute and load, interpreted."""
    batch = make_batch(shape, torch.device("cpu"))
    present, out = gather(batch)
    expected = grouped_attention_reference(
        batch.q,
        batch.k,
        batch.v,
        batch.tables,
        batch.seq_lens,
        batch.starts,
        shape.head_size**-0.5,
    )
    for one in present:
        # Keys and values interleave: they are counted together.
        traffic = Traffic(cache=batch.cache)
        with on_cpu(traffic):
            check(batch, one, expected)
        assert one.work is not None
        out[one.name] = {
            "status": "agrees",
            **one.notes,
            "bytes_predicted": one.work.loaded * shape.layer.token_bytes,
            "bytes_counted": traffic.loaded["cache"],
        }
    every = {name: out[name] for name in IMPLEMENTATIONS}
    return {**asdict(shape), "contenders": every}


def run(
    shapes: list[Shape], device: torch.device, repeats: int | None, output: Path
) -> dict[str, Any]:
    """Measure all shapes and write the result, after each so that none is lost.

    Args:
        shapes: to measure, in this order.
        device: to measure on.
        repeats: how often each implementation is timed; None interprets.
        output: JSON.

    Raises:
        MismatchError: an implementation computes something else.
    """
    architecture = architecture_of(device)
    result: dict[str, Any] = {
        "mode": "interpreted" if repeats is None else "timed",
        "device": {"name": "interpreter", "architecture": architecture},
        "versions": versions(),
        "settings": {"page": PAGE, "dtype": "bfloat16", "tolerance": TOLERANCE},
        "rows": [],
    }
    clock = None
    if repeats is not None:
        peaks = DEVICES[table_name(architecture)]
        result["device"]["name"] = torch.cuda.get_device_name(device)
        result["device"]["model"] = {"of": table_name(architecture), **asdict(peaks)}
        result["settings"]["repeats"] = repeats
        clock = Clock(device, peaks.cache_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    for shape in tqdm(shapes, disable=None, unit="batch"):
        if clock is None or repeats is None:
            row = interpret_row(shape)
        else:
            gc.collect()
            torch.cuda.empty_cache()
            room = torch.cuda.mem_get_info()[0]
            if shape.memory() > room:
                needs = f"needs {shape.memory() / 1e9:.0f} GB of {room / 1e9:.0f} free"
                row = {**asdict(shape), "skipped": needs}
            else:
                row = time_row(shape, device, clock, repeats)
        result["rows"].append(row)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def versions() -> dict[str, str | None]:
    """Return the versions of what takes part; None for what is not installed."""
    out: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in ("vllm-radix", "vllm", "torch", "triton", "flashinfer-python"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    return out
