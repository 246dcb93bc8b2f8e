"""Bytes that attention kernels ask for, counted: ``make traffic``.

Runs vLLM's unified Triton kernel and ours on the same batches in the interpreter, which
counts each element that a load's mask lets through, and compares the counts with the
model's. One KV head of 128, four query heads, bfloat16: the ratios are those of any
number of KV heads. Minutes, for every load is interpreted. Bytes asked for are not
bytes from memory: a device's caches serve some of them (``make roofline``).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_radix_bench.attention.batches import Shape, make_batch
from vllm_radix_bench.attention.implementations import (
    MissingError,
    check,
    ours,
    stock,
)
from vllm_radix_bench.attention.measure import on_cpu
from vllm_radix_kernels.interpreter import Traffic

SHAPES = {
    "decode: 32 x 1 over 4k": Shape(32, 1, 4096, 1, 4, 1, tail=64),
    "decode: 16 x 1, 2 groups, 3 levels, 2k": Shape(16, 1, 2048, 3, 4, 1, tail=64),
    "decode: 8 x 1 over 1k, own 256": Shape(8, 1, 1024, 1, 4, 1),
    "extend: 8 x 4 over 2k": Shape(8, 4, 2048, 1, 4, 1, tail=64),
    "prefill: 2 x 64 over 512": Shape(2, 64, 512, 1, 4, 1, tail=64),
    "nothing shared: 8 x 1, 1k": Shape(8, 1, 1024, 0, 4, 1, tail=64),
}

Row = dict[str, Any]


def count(shape: Shape) -> Row:
    """Return the bytes of one shape.

    Returns:
        ``stock`` and ``ours``: bytes of keys and values counted; ``stock_model`` and
        ``ours_model``: the model's; ``partials``: bytes of partial results counted,
        written and read; ``grouped``: whether ours ran, or the step is vLLM's.
    """
    batch = make_batch(shape, torch.device("cpu"))
    token = shape.layer.token_bytes
    theirs = stock(batch)
    traffic = Traffic(cache=batch.cache)
    with on_cpu(traffic):
        expected = check(batch, theirs, None)
    assert theirs.work is not None
    row = {
        "stock": traffic.loaded["cache"],
        "stock_model": theirs.work.loaded * token,
    }
    try:
        mine = ours(batch)
    except MissingError:
        same = {"ours": row["stock"], "ours_model": row["stock_model"]}
        return {**row, **same, "partials": 0, "grouped": False}
    assert mine.work is not None and mine.plan is not None
    traffic = Traffic(cache=batch.cache, part=mine.plan.part, lse=mine.plan.lse)
    with on_cpu(traffic):
        check(batch, mine, expected)
    partials = sum(
        counts[name]
        for counts in (traffic.loaded, traffic.stored)
        for name in ("part", "lse")
    )
    return {
        **row,
        "ours": traffic.loaded["cache"],
        "ours_model": mine.work.loaded * token,
        "partials": partials,
        "grouped": True,
    }


def ratios(row: Row) -> tuple[float, float]:
    """Return how many times fewer bytes ours asks for: of keys, and net."""
    return row["stock"] / row["ours"], row["stock"] / (row["ours"] + row["partials"])


def show(rows: dict[str, Row]) -> Table:
    """Return the table."""
    table = Table(
        title="MB of keys and values that kernels load, counted (model)",
        caption="net: partial results, written and read, are counted against ours",
    )
    for name in ("batch", "vLLM's kernel", "grouped", "partials", "fewer", "net"):
        table.add_column(name, justify="left" if name == "batch" else "right")
    for name, row in rows.items():
        fewer, net = ratios(row)
        table.add_row(
            name,
            f"{row['stock'] / 1e6:.2f} ({row['stock_model'] / 1e6:.2f})",
            f"{row['ours'] / 1e6:.2f} ({row['ours_model'] / 1e6:.2f})"
            if row["grouped"]
            else "left to vLLM",
            f"{row['partials'] / 1e6:.2f}",
            f"x {fewer:.2f}",
            f"x {net:.2f}",
        )
    return table


def plot(rows: dict[str, Row], path: Path) -> None:
    """Draw bytes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    places = range(len(rows))
    stock_mb = [row["stock"] / 1e6 for row in rows.values()]
    ours_mb = [row["ours"] / 1e6 for row in rows.values()]
    partials = [row["partials"] / 1e6 for row in rows.values()]
    axes.barh([p - 0.2 for p in places], stock_mb, 0.4, label="vLLM's Triton kernel")
    axes.barh([p + 0.2 for p in places], ours_mb, 0.4, label="grouped")
    axes.barh(
        [p + 0.2 for p in places], partials, 0.4, left=ours_mb, label="its partials"
    )
    axes.set_yticks(list(places), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel="MB asked for, one KV head (counted in the interpreter)")
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Count, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="where to draw, a .png")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.plot.parent.is_dir():
        parser.error(f"--plot: {arguments.plot.parent} is no folder")
    bar = tqdm(SHAPES.items(), leave=False)
    rows = {name: count(shape) for name, shape in bar}
    Console(width=120).print(show(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
