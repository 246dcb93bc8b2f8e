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
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_radix.attention.cost import DEVICES, loaded_bytes, seconds
from vllm_radix_bench.contenders import (
    CONTENDERS,
    DECLINED,
    OURS,
    PAGE,
    TOLERANCE,
    VLLM,
    Contender,
    MismatchError,
    Row,
    Shape,
    check,
    gather,
    make_batch,
)
from vllm_radix_kernels.grouped_attention import grouped_attention_reference
from vllm_radix_kernels.interpreter import Traffic, interpreted
from vllm_radix_kernels.tiles import architecture_of, table_name

WARM_UP, PAUSE = 3, 1_000_000
"""Rounds that are not counted, and cycles that launches queue behind."""

REPEATS = 30
BATCHES = ((8, 1), (32, 1), (128, 1), (8, 4), (32, 16))
HEADS = ((32, 8), (32, 32), (64, 8))
GRID: Row = {
    "batch": BATCHES,
    "prefix": (1024, 4096, 16384),
    "levels": (0, 1, 2, 3),
    "heads": HEADS,
}
QUICK: Row = {
    "batch": ((32, 1), (8, 4)),
    "prefix": (4096,),
    "levels": (0, 1, 2),
    "heads": ((32, 8),),
}
TINY: Row = {
    "batch": ((8, 1), (8, 3)),
    "prefix": (288,),
    "levels": (0, 1),
    "heads": ((2, 1),),
}
"""Where only some of the lists are given for ``--interpret``."""

TINY_SIZES = {"tail": 21, "head_size": 32}
TINY_SHAPES = tuple(
    Shape(*batch, prefix=288, levels=levels, heads=2, kv_heads=kv_heads, **TINY_SIZES)
    for batch, levels, kv_heads in (
        ((4, 1), 0, 1),
        ((4, 1), 1, 1),
        ((4, 3), 1, 2),
        ((4, 1), 2, 1),
        ((8, 1), 3, 1),
        ((8, 3), 3, 1),
    )
)


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
            cold, size = times["cold_s"]["median"], loaded_bytes(shape.layer, who.work)
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
    shapes: list[Shape], device: torch.device, repeats: int | None, output: Path
) -> dict[str, Any]:
    """Measure all shapes and write the result, after each so that none is lost.

    Args:
        shapes: to measure, in this order.
        device: to measure on.
        repeats: how often each contender is timed; None interprets.
        output: JSON.

    Raises:
        MismatchError: a contender computes something else.
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


def _figure(row: Row, name: str) -> str:
    """Return a contender's cell: microseconds and range, or agreement and bytes."""
    one = row["contenders"][name]
    if one["status"] == "agrees":
        equal = one["bytes_predicted"] == one["bytes_counted"]
        counted = f"{one['bytes_counted']:,} B"
        aside = "" if equal else f" ({one['bytes_predicted']:,} predicted)"
        return f"{counted}{aside}, off by {one['difference']:.4f}"
    if one["status"] != "measured":
        return DECLINED if one["status"] == DECLINED else "-"
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
        f"{result['device']['name']}: us cold, median (range); bytes loaded; of the "
        f"time by the model of {result['device']['model']['of']}"
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
    prefixes = sorted({row["prefix"] for row in rows})
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
        declined = [
            r for r in rows if r["levels"] == level and r["speedup"]["declined"]
        ]
        for row in declined:
            panel.plot(row["prefix"], 1, "o", color="white", mec="grey", zorder=3)
        panel.axhline(1, color="grey", linewidth=0.8)
        title = "nothing shared" if level == 0 else f"levels of sharing: {level}"
        panel.set(title=title, xlabel="prefix, tokens")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(prefixes, [f"{prefix:,}" for prefix in prefixes])
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("speed-up over vLLM's Triton kernel, cold")
    panels[0][-1].legend(title="requests, heads", fontsize=7)
    figure.suptitle(result["device"]["name"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _batch(text: str) -> tuple[int, int]:
    requests, _, new = text.partition("x")
    try:
        made = int(requests), int(new or 1)
    except ValueError:
        made = 0, 0
    if min(made) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of requests nor requests x new tokens (8x4)"
        )
    return made


def _prefix(text: str) -> int:
    number = text.removesuffix("k")
    factor = 1 if number == text else 1024
    if not number.isdecimal() or int(number) < 1 or int(number) * factor % PAGE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens (4096, 4k) in pages of {PAGE}"
        )
    return int(number) * factor


def _heads(text: str) -> tuple[int, int]:
    heads, _, kv_heads = text.partition("/")
    if not (heads.isdecimal() and kv_heads.isdecimal() and int(kv_heads)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not query heads / KV heads (32/8)"
        )
    made = int(heads), int(kv_heads)
    if not made[0] or made[0] % made[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {made[0]} is no multiple of {made[1]}"
        )
    return made


def _repeats(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_radix_bench.bench_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a small grid")
    mode.add_argument(
        "--interpret", action="store_true", help="no GPU, tiny shapes, no times"
    )
    mode.add_argument(
        "--replot", type=Path, metavar="FILE.json", help="draw a result again"
    )
    grid = parser.add_argument_group("grid", "each replaces the grid's own list")
    grid.add_argument(
        "--batch", type=_batch, nargs="+", help="requests, or requests x new tokens"
    )
    grid.add_argument("--prefix", type=_prefix, nargs="+", help="tokens: 4096 or 4k")
    grid.add_argument(
        "--levels", type=int, nargs="+", choices=(0, 1, 2, 3), help="0 shares nothing"
    )
    grid.add_argument("--heads", type=_heads, nargs="+", help="query / KV heads: 32/8")
    parser.add_argument(
        "--repeats", type=_repeats, help=f"times of each contender (default {REPEATS})"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="default results/bench_attention.json; interpreted, -interpreted.json",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the speed-up (with --replot: default FILE.png of its name)",
    )
    return parser


def shapes_of(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser
) -> list[Shape]:
    """Return the shapes asked for, the longest prefixes last; exits with 2 if bad."""
    base = TINY if arguments.interpret else QUICK if arguments.quick else GRID
    lists = {name: getattr(arguments, name) or base[name] for name in base}
    sizes = TINY_SIZES if arguments.interpret else {}
    shapes = [
        Shape(*batch, prefix, levels, *heads, **sizes)
        for prefix, heads, levels, batch in itertools.product(
            lists["prefix"], lists["heads"], lists["levels"], lists["batch"]
        )
    ]
    if arguments.interpret and not any(getattr(arguments, name) for name in base):
        return list(TINY_SHAPES)
    for shape in shapes:
        if shape.requests < 1 << shape.levels:
            parser.error(
                f"--levels {shape.levels} needs batches of {1 << shape.levels} "
                f"requests or more, not {shape.requests}"
            )
        if shape.prefix // PAGE < shape.levels:
            parser.error(f"--prefix {shape.prefix}: no page for each level of sharing")
        if shape.new_tokens > shape.tail:
            parser.error(
                f"--batch {shape.requests}x{shape.new_tokens}: at most {shape.tail} "
                "new tokens, the length of a request's own"
            )
    return shapes


def _replot(path: Path, target: Path, parser: argparse.ArgumentParser) -> None:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--replot {path}: {error}")
    if not isinstance(result, dict) or result.get("mode") != "timed":
        parser.error(f"--replot {path}: not a timed result of this benchmark")
    if not any("speedup" in row for row in result["rows"]):
        parser.error(f"--replot {path}: no row of it was timed")
    plot(result, target)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns an exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 220)
    if (arguments.plot or arguments.replot) and not find_spec("matplotlib"):
        parser.error("--plot and --replot: matplotlib is not installed")
    if arguments.replot:
        target = arguments.plot or arguments.replot.with_suffix(".png")
        _replot(arguments.replot, target, parser)
        console.print(str(target))
        return 0
    interpret = arguments.interpret
    for name in ("repeats", "plot"):
        if interpret and getattr(arguments, name):
            parser.error(f"--{name}: nothing is timed with --interpret")
    shapes = shapes_of(arguments, parser)
    problem = None if interpret else _no_device()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    name = "bench_attention-interpreted" if interpret else "bench_attention"
    output = arguments.output or Path("results", f"{name}.json")
    repeats = None if interpret else arguments.repeats or REPEATS
    try:
        device = torch.device("cpu" if interpret else "cuda")
        result = run(shapes, device, repeats, output)
    except MismatchError as error:
        print(f"MISMATCH: {error}", file=sys.stderr)
        return 1
    console.print(table(result))
    for line in absences(result):
        console.print(line, highlight=False)
    console.print(str(output))
    if arguments.plot and any("speedup" in row for row in result["rows"]):
        plot(result, arguments.plot)
        console.print(str(arguments.plot))
    return 0


def _no_device() -> str | None:
    """Return what keeps this machine from timing, or None."""
    hint = "--interpret runs every path that needs none, untimed"
    if not torch.cuda.is_available():
        return f"no GPU: {hint}"
    try:
        table_name(architecture_of(torch.device("cuda")))
    except ValueError as error:
        return f"no GPU that the kernels are built for ({error}): {hint}"
    return None


if __name__ == "__main__":
    sys.exit(main())
