"""Grouped attention beside vLLM's kernels and FlashInfer's cascade, on one GPU.

    python -m vllm_radix_bench.bench_attention

One layer's attention over a paged cache, in bfloat16, blocks shuffled as after hours
of serving. Requests share prefixes in a tree of as many levels as asked for, evenly:
with one, all have the same prefix; with two, a system prompt and documents; 0 shares
nothing. All contenders get the same cache and queries, and must agree before anything
is timed. FlashInfer gets the requests sorted as its API needs them; all get their
plans and schedules beforehand, as layers after the first do.

Timed on the device by events, the contenders in turn: `cold` with caches flushed
before each call, as a layer finds them whose weights and activations went by; `warm`
right after a call of its own. Launches are queued behind a pause, so that the host's
time is in no figure. `of model` is the time that `vllm_radix.attention.cost` predicts
over the time taken. Where the planner declines, a step runs vLLM's kernel, and the
speed-up is 1 by definition.

    python -m vllm_radix_bench.bench_attention --interpret

runs every path that needs no GPU on tiny shapes and says nothing about time.
"""

import argparse
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_radix.attention.buffers import PlanBuffers
from vllm_radix.attention.cost import DEVICES, Layer, Work, seconds
from vllm_radix.attention.plan import Limits, Plan, Planner
from vllm_radix_bench import vllm_kernel
from vllm_radix_kernels.grouped_attention import (
    grouped_attention,
    grouped_attention_reference,
)
from vllm_radix_kernels.interpreter import Traffic, interpreted
from vllm_radix_kernels.tiles import architecture_of, choose, table_name

PAGE = 16
TOLERANCE = 2e-2
"""Of a head's output: length of the difference over length. A plain bound would not
notice a lost page, for averages over many keys are small."""

PARTIAL_MEMORY = 64 << 20
"""Bytes for partial results, as in ``vllm_radix.attention.backend``."""

WARM_UP, PAUSE = 3, 1_000_000
"""Rounds that are not counted, and cycles that launches queue behind."""

OURS, VLLM, FLASH, CASCADE = "grouped", "vLLM Triton", "FlashAttention", "FlashInfer"
DECLINED = "left to vLLM"

Row = dict[str, Any]


class MismatchError(Exception):
    """A contender computes something else."""


class MissingError(Exception):
    """A contender is not there, or does not take a batch; says why."""


@dataclass(frozen=True)
class Shape:
    """A batch: requests over a tree of shared prefixes.

    Attributes:
        requests: of the batch.
        new_tokens: query rows of each.
        prefix: tokens before a request's own, on all levels together.
        levels: of sharing; 0 for none.
        heads: query heads.
        kv_heads: key and value heads.
        tail: a request's own tokens, new ones included.
        head_size: elements of a head.
    """

    requests: int
    new_tokens: int
    prefix: int
    levels: int
    heads: int
    kv_heads: int
    tail: int = 256
    head_size: int = 128

    @property
    def length(self) -> int:
        """Tokens of each request."""
        return self.prefix + self.tail

    @property
    def layer(self) -> Layer:
        """The layer, for the cost model."""
        return Layer(self.heads, self.kv_heads, self.head_size, 2)

    def runs(self) -> list[tuple[int, int]]:
        """Return the nodes and the blocks of each node's run, by level."""
        blocks, out = self.prefix // PAGE, []
        for level in range(self.levels):
            nodes = 1 << int(np.log2(self.requests) * level / self.levels)
            extra = blocks % self.levels if level == 0 else 0
            out.append((nodes, blocks // self.levels + extra))
        return out

    def own_blocks(self) -> int:
        """Return the blocks that each request has for itself."""
        return -(-(self.tail if self.levels else self.length) // PAGE)

    def blocks(self) -> int:
        """Return the blocks of the batch."""
        shared = sum(nodes * length for nodes, length in self.runs())
        return shared + self.requests * self.own_blocks()

    def memory(self) -> int:
        """Return the bytes that a run needs on the device, roughly."""
        cache = self.blocks() * PAGE * self.layer.token_bytes
        return cache + 4 * PARTIAL_MEMORY + (1 << 30)

    def stock_work(self, tile_rows: int) -> Work:
        """Return what a kernel does that reads each request by itself."""
        per_tile = max(1, tile_rows // self.layer.group)
        ends = [*range(per_tile, self.new_tokens, per_tile), self.new_tokens]
        context = self.length - self.new_tokens
        shared = PAGE * sum(nodes * length for nodes, length in self.runs())
        own = self.tail if self.levels else self.length
        return Work(
            loaded=self.requests * sum(context + end for end in ends),
            unique=shared + self.requests * own,
            repeated=shared,
            tile=max(tile_rows, self.layer.group),
            partials=0,
            launches=1,
        )

    def __str__(self) -> str:
        new = f" x {self.new_tokens}" if self.new_tokens > 1 else ""
        return (
            f"{self.requests}{new} requests, prefix {self.prefix}, "
            f"levels {self.levels}, heads {self.heads}/{self.kv_heads}"
        )


@dataclass
class Batch:
    """A batch on a device; see ``grouped_attention`` for the tensors.

    Attributes:
        shape: of the batch.
        order: [R] its requests as they stand in the tree.
        host: block tables, lengths and query starts, for planners.
    """

    shape: Shape
    order: np.ndarray
    host: tuple[np.ndarray, np.ndarray, np.ndarray]
    cache: torch.Tensor
    q: torch.Tensor
    tables: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor

    @property
    def k(self) -> torch.Tensor:
        """Keys [blocks, page, KV heads, D]; vLLM has values beside them."""
        return self.cache[..., : self.shape.head_size]

    @property
    def v(self) -> torch.Tensor:
        """Values, likewise."""
        return self.cache[..., self.shape.head_size :]


def make_batch(shape: Shape, device: torch.device, seed: int = 0) -> Batch:
    """Return a batch of random queries, keys and values."""
    rng = np.random.default_rng(seed)
    count, new = shape.requests, shape.new_tokens
    free = rng.permutation(shape.blocks()).astype(np.int32)
    columns, used = [], 0
    for nodes, length in [*shape.runs(), (count, shape.own_blocks())]:
        blocks = free[used : used + nodes * length].reshape(nodes, length)
        used += nodes * length
        columns.append(blocks[np.arange(count) * nodes // count])
    # A batch is in the order its requests came in, not in the tree's.
    order = rng.permutation(count)
    tables = np.empty((count, sum(c.shape[1] for c in columns)), dtype=np.int32)
    tables[order] = np.concatenate(columns, 1)
    seq_lens = np.full(count, shape.length, dtype=np.int32)
    starts = (np.arange(count + 1) * new).astype(np.int32)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(
            sizes, generator=generator, device=device, dtype=torch.bfloat16
        )

    return Batch(
        shape,
        order,
        (tables, seq_lens, starts),
        normal(shape.blocks(), PAGE, shape.kv_heads, 2 * shape.head_size),
        normal(count * new, shape.heads, shape.head_size),
        *(torch.from_numpy(x).to(device) for x in (tables, seq_lens, starts)),
    )


@dataclass
class Contender:
    """One way to compute a batch's attention.

    Attributes:
        name: for tables.
        call: computes, and returns [T, H, D].
        work: for the cost model; None where it says nothing.
        back: rows of the result for each of the batch's; None for as they are.
        notes: for the record.
    """

    name: str
    call: Callable[[], torch.Tensor]
    work: Work | None = None
    back: torch.Tensor | None = None
    notes: Row = field(default_factory=dict)


def ours(batch: Batch) -> Contender:
    """Return grouped attention, planned for the batch's device."""
    shape, device = batch.shape, batch.q.device
    layer = shape.layer
    architecture = table_name(architecture_of(device))
    tile = choose(architecture, shape.head_size, layer.group, batch.q.dtype)
    limits = Limits(
        layer=layer,
        device=DEVICES[architecture],
        block_size=PAGE,
        tile_rows=tile.m,
        max_partials=PARTIAL_MEMORY // (layer.partial_bytes // 2),
    )
    plan: Plan | None = Planner(limits).plan(*batch.host)
    if plan is None:
        raise MissingError(DECLINED)
    buffers = PlanBuffers(limits, tile, len(batch.q), device)
    loaded = buffers.load(plan)
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        grouped_attention(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            loaded,
            shape.head_size**-0.5,
        )
        return out

    notes = {
        "tile": asdict(tile),
        "items": len(plan.items),
        "partials": plan.num_partials,
        "nodes": plan.num_nodes,
        "levels": plan.levels,
    }
    return Contender(OURS, call, plan.work, notes=notes)


def stock(batch: Batch) -> Contender:
    """Return vLLM's unified Triton kernel, called as its backend calls it."""
    shape, device = batch.shape, batch.q.device
    buffers = vllm_kernel.segment_buffers(
        shape.heads, shape.kv_heads, shape.head_size, shape.requests, device
    )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        vllm_kernel.attend(
            batch.q,
            batch.k,
            batch.v,
            out,
            batch.tables,
            batch.seq_lens,
            batch.starts,
            shape.new_tokens,
            shape.length,
            buffers,
        )
        return out

    split = vllm_kernel.splits(shape.requests, shape.new_tokens, shape.kv_heads)
    notes = {"variant": "3D" if split else "2D"}
    return Contender(VLLM, call, shape.stock_work(16), notes=notes)


def flash(batch: Batch) -> Contender:
    """Return FlashAttention as vLLM ships it, scheduled as its backend does."""
    if batch.q.device.type == "cpu":
        raise MissingError("needs a GPU")
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        raise MissingError(str(error)) from None
    shape = batch.shape
    fa_version = get_flash_attn_version(head_size=shape.head_size)
    if fa_version is None:
        raise MissingError("vLLM has no version of it for this device")
    schedule = None
    if fa_version == 3:
        schedule = get_scheduler_metadata(
            batch_size=shape.requests,
            max_seqlen_q=shape.new_tokens,
            max_seqlen_k=shape.length,
            num_heads_q=shape.heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=batch.q.dtype,
            cu_seqlens_q=batch.starts,
            page_size=PAGE,
            causal=True,
        )
    out = torch.full_like(batch.q, float("nan"))

    def call() -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.q,
            k=batch.k,
            v=batch.v,
            out=out,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=shape.new_tokens,
            seqused_k=batch.seq_lens,
            max_seqlen_k=shape.length,
            softmax_scale=shape.head_size**-0.5,
            causal=True,
            block_table=batch.tables,
            scheduler_metadata=schedule,
            fa_version=fa_version,
        )
        return out

    # The rows that the planner takes its tiles to have.
    return Contender(
        FLASH, call, shape.stock_work(64), notes={"version": int(fa_version)}
    )


def cascade(batch: Batch) -> Contender:
    """Return FlashInfer's multi-level cascade, one level for each and the tails."""
    if batch.q.device.type == "cpu":
        raise MissingError("needs a GPU")
    try:
        from flashinfer.cascade import MultiLevelCascadeAttentionWrapper
    except ImportError:
        raise MissingError("FlashInfer is not installed") from None
    shape, device = batch.shape, batch.q.device
    if not shape.levels:
        raise MissingError("nothing is shared")
    tables, new, count = batch.host[0][batch.order], shape.new_tokens, shape.requests
    rows = np.repeat(batch.order * new, new) + np.tile(np.arange(new), count)
    levels: list[list[torch.Tensor]] = [[], [], [], []]
    start = 0
    for nodes, length in [*shape.runs(), (count, shape.own_blocks())]:
        members = np.arange(count) * nodes // count
        starts = np.searchsorted(members, np.arange(nodes + 1))
        last = PAGE if start < shape.prefix // PAGE else (shape.tail - 1) % PAGE + 1
        arrays = (
            starts * new,
            np.arange(nodes + 1) * length,
            tables[starts[:-1], start : start + length].ravel(),
            np.full(nodes, last),
        )
        for into, array in zip(levels, arrays, strict=True):
            into.append(torch.from_numpy(array.astype(np.int32)).to(device))
        start += length
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(shape.levels + 1, workspace, "NHD")
    wrapper.plan(
        *levels,
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        PAGE,
        causal=True,
        q_data_type=batch.q.dtype,
    )
    index = torch.from_numpy(rows).to(device)
    q, caches = batch.q[index], (batch.k, batch.v)
    return Contender(
        CASCADE, lambda: wrapper.run(q, caches), back=torch.argsort(index)
    )


CONTENDERS = {OURS: ours, VLLM: stock, FLASH: flash, CASCADE: cascade}


def gather(batch: Batch) -> tuple[list[Contender], dict[str, Row]]:
    """Return the contenders of a batch, and why the others are none."""
    present, absent = [], {}
    for name, make in CONTENDERS.items():
        try:
            present.append(make(batch))
        except MissingError as error:
            absent[name] = {"status": str(error)}
        except Exception as error:
            # What is not ours may refuse a device or a shape in any way.
            if name in (OURS, VLLM):
                raise
            absent[name] = {"status": f"failed: {error!r}"}
    return present, absent


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a head's output, over its length."""
    wide, right = result.double(), expected.double()
    relative = (wide - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)
    return float(relative.nan_to_num(float("inf")).max())


def check(batch: Batch, who: Contender, expected: torch.Tensor | None) -> torch.Tensor:
    """Return what a contender computes, in the batch's order.

    Raises:
        MismatchError: it is further from ``expected`` than ``TOLERANCE``.
    """
    result = who.call()
    result = (result if who.back is None else result[who.back]).clone()
    error = 0.0 if expected is None else difference(result, expected)
    who.notes["difference"] = error
    if not (error <= TOLERANCE and bool(result.isfinite().all())):
        raise MismatchError(
            f"{who.name} differs by {error:.3g} (at most {TOLERANCE} of a head's "
            f"output): {batch.shape}"
        )
    return result


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

    def measure(self, who: list[Contender], repeats: int) -> list[dict[str, Row]]:
        """Return each contender's seconds, cold and warm, taken in turns."""
        events: list[list[tuple[Any, Any]]] = [[] for _ in who]
        for number in range(WARM_UP + repeats):
            for place in range(len(who)):
                one = (place + number) % len(who)
                self._flush.zero_()
                cold = self._pair(who[one].call)
                warm = self._pair(who[one].call)
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


def loaded_bytes(shape: Shape, work: Work) -> int:
    """Return what tiles load, and the partial results."""
    layer = shape.layer
    return work.loaded * layer.token_bytes + work.partials * layer.partial_bytes


def time_row(shape: Shape, device: torch.device, clock: Clock, repeats: int) -> Row:
    """Return a timed row of the result."""
    batch = make_batch(shape, device)
    present, absent = gather(batch)
    expected = None
    for who in present:
        result = check(batch, who, expected)
        expected = result if expected is None else expected
    peaks = DEVICES[table_name(architecture_of(device))]
    out: dict[str, Row] = {}
    for who, times in zip(present, clock.measure(present, repeats), strict=True):
        out[who.name] = {"status": "measured", **who.notes, **times}
        if who.work is not None:
            cold, size = times["cold_s"]["median"], loaded_bytes(shape, who.work)
            predicted = seconds(peaks, shape.layer, who.work)
            out[who.name] |= {
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
    for who in present:
        # Keys and values interleave: they are counted together.
        traffic = Traffic(cache=batch.cache)
        with on_cpu(traffic):
            check(batch, who, expected)
        assert who.work is not None
        out[who.name] = {
            "status": "agrees",
            **who.notes,
            "bytes_predicted": who.work.loaded * shape.layer.token_bytes,
            "bytes_counted": traffic.loaded["cache"],
        }
    return {**asdict(shape), "contenders": {name: out[name] for name in CONTENDERS}}


def run(
    shapes: list[Shape], repeats: int | None, output: Path
) -> dict[str, Any]:
    """Measure all shapes and write the result, after each so that none is lost.

    Args:
        shapes: to measure, in this order.
        repeats: how often each contender is timed; None interprets.
        output: JSON.

    Raises:
        MismatchError: a contender computes something else.
    """
    device = torch.device("cpu" if repeats is None else "cuda")
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


def _figure(row: Row, name: str) -> str:
    """Return a contender's cell: microseconds and range, or agreement and bytes."""
    one = row["contenders"][name]
    if one["status"] == "agrees":
        equal = one["bytes_predicted"] == one["bytes_counted"]
        counted = f"{one['bytes_counted']:,} B"
        aside = "" if equal else f" ({one['bytes_predicted']:,} predicted)"
        return f"{counted}{aside}, off by {one['difference']:.4f}"
    if one["status"] != "measured":
        return "-"
    cold = one["cold_s"]
    text = f"{cold['median'] * 1e6:,.0f} ({cold['min'] * 1e6:,.0f}-"
    text += f"{cold['max'] * 1e6:,.0f})"
    if "bytes" in one:
        text += f" {one['bytes_per_s'] / 1e12:.2f} TB/s {one['of_model']:.0%}"
    return text


def table(result: dict[str, Any]) -> Table:
    """Return the result for a reader."""
    timed = result["mode"] == "timed"
    title = (
        f"{result['device']['name']}: us cold, median (range); bytes loaded; of model"
        if timed
        else "interpreted: bytes of keys and values loaded; largest difference"
    )
    out = Table(title=title)
    for name in ("requests", "prefix", "levels", "heads", *CONTENDERS):
        out.add_column(name, justify="right")
    if timed:
        out.add_column("over vLLM: predicted / cold / warm", justify="right")
    for row in result["rows"]:
        new = f" x {row['new_tokens']}" if row["new_tokens"] > 1 else ""
        cells = [f"{row['requests']}{new}", str(row["prefix"]), str(row["levels"])]
        cells.append(f"{row['heads']}/{row['kv_heads']}")
        if "skipped" in row:
            out.add_row(*cells, row["skipped"])
            continue
        cells += [_figure(row, name) for name in CONTENDERS]
        if timed:
            gain = row["speedup"]
            figures = (f"{gain[n]:.2f}" for n in ("predicted", "cold", "warm"))
            cells.append(DECLINED if gain["declined"] else " / ".join(figures))
        out.add_row(*cells)
    return out


def absences(result: dict[str, Any]) -> list[str]:
    """Return a line for each contender and reason why it did not run, with counts."""
    counts: dict[tuple[str, str], int] = {}
    rows = [row for row in result["rows"] if "contenders" in row]
    for row in rows:
        for name, one in row["contenders"].items():
            if one["status"] not in ("measured", "agrees"):
                key = (name, one["status"])
                counts[key] = counts.get(key, 0) + 1
    return [
        f"{name}: {why} ({count} of {len(rows)} batches)"
        for (name, why), count in counts.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over vLLM's kernel by prefix, one panel per levels.

    Hollow marks are batches that the planner leaves to vLLM; dotted, the prediction.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "speedup" in row]
    levels = sorted({row["levels"] for row in rows})
    batches = list(dict.fromkeys((r["requests"], r["new_tokens"]) for r in rows))
    heads = list(dict.fromkeys((row["heads"], row["kv_heads"]) for row in rows))
    figure, panels = pyplot.subplots(
        1, len(levels), figsize=(4 * len(levels) + 1, 4), sharey=True, squeeze=False
    )
    for panel, level in zip(panels[0], levels, strict=True):
        for (b, batch), (h, head) in itertools.product(
            enumerate(batches), enumerate(heads)
        ):
            line = sorted(
                (row["prefix"], row["speedup"]["cold"], row["speedup"]["predicted"])
                for row in rows
                if row["levels"] == level
                and (row["requests"], row["new_tokens"]) == batch
                and (row["heads"], row["kv_heads"]) == head
            )
            if not line:
                continue
            x, cold, predicted = zip(*line, strict=True)
            new = f" x {batch[1]}" if batch[1] > 1 else ""
            label = f"{batch[0]}{new}, {head[0]}/{head[1]}"
            style = {"color": f"C{b % 10}", "marker": "os^Dv"[h % 5]}
            panel.plot(x, cold, label=label, **style)
            panel.plot(x, predicted, ":", color=style["color"], linewidth=0.8)
        declined = [r for r in rows if r["levels"] == level and r["speedup"]["declined"]]
        for row in declined:
            panel.plot(row["prefix"], 1, "o", color="white", mec="grey", zorder=3)
        panel.axhline(1, color="grey", linewidth=0.8)
        title = "nothing shared" if level == 0 else f"levels of sharing: {level}"
        panel.set(title=title, xlabel="prefix, tokens", xscale="log")
    panels[0][0].set_ylabel("speed-up over vLLM's Triton kernel, cold")
    panels[0][-1].legend(title="requests, heads", fontsize=7)
    figure.suptitle(result["device"]["name"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
