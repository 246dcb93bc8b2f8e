"""Grouped attention beside vLLM's kernels and FlashInfer's cascade, on one GPU.

    python -m vllm_radix_bench.attention

One layer's attention over a paged cache, in bfloat16, blocks shuffled as after hours
of serving. Requests share prefixes in a tree of as many levels as asked for, evenly:
with one, all have the same prefix; with two, a system prompt and documents; 0 shares
nothing. All implementations get the same cache and queries, and must agree before
anything is timed. FlashInfer gets the requests sorted as its API needs them; all get
their plans and schedules beforehand, as layers after the first do.

`cold`: with caches flushed before each call; `warm`: right after a call of its own;
see ``measure``. `of model` is the time that `vllm_radix.attention.cost` predicts
over the time taken. Where the planner declines, a step runs vLLM's kernel, and the
speed-up is 1 by definition.

    python -m vllm_radix_bench.attention --interpret

runs every path that needs no GPU on tiny shapes and says nothing about time.
"""

import argparse
import itertools
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from vllm_radix_bench.attention.batches import PAGE, Shape
from vllm_radix_bench.attention.implementations import MismatchError, Row
from vllm_radix_bench.attention.measure import run
from vllm_radix_bench.attention.report import absences, plot, table
from vllm_radix_bench.report.tables import console
from vllm_radix_kernels.tiles import architecture_of, table_name

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
        prog="python -m vllm_radix_bench.attention",
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
        "--repeats",
        type=_repeats,
        help=f"runs of each implementation (default {REPEATS})",
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
    out = console(220)
    if (arguments.plot or arguments.replot) and not find_spec("matplotlib"):
        parser.error("--plot and --replot: matplotlib is not installed")
    if arguments.replot:
        target = arguments.plot or arguments.replot.with_suffix(".png")
        _replot(arguments.replot, target, parser)
        out.print(str(target))
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
    out.print(table(result))
    for line in absences(result):
        out.print(line, highlight=False)
    out.print(str(output))
    if arguments.plot and any("speedup" in row for row in result["rows"]):
        plot(result, arguments.plot)
        out.print(str(arguments.plot))
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
