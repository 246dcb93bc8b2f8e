"""What grouped attention should gain on a GPU, by a roofline: ``make roofline``.

Prints for each shape the bytes, operations and launches of one layer for vLLM's Triton
kernel and for ours, the time that the model of ``vllm_radix/attention/cost.py`` gives
both, and what the planner chooses. vLLM's kernel is credited with tiles as large as
ours, for what those gain is not grouping's. Shapes where grouping does not pay are
among them. A model, fitted to an H100 (``tools/gpu/fit_cost.py``, docs/gpu.md): nothing
here is a measurement, and ``python -m vllm_radix_bench.attention`` is what judges it.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_radix.attention.cost import (
    DEVICES,
    Layer,
    Work,
    loaded_bytes,
    operations,
    seconds,
)
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_kernels.tiles import choose

PAGE = 16
LLAMA = Layer(num_heads=32, num_kv_heads=8, head_size=128, kv_bytes=2)
MULTI_HEAD = Layer(num_heads=32, num_kv_heads=32, head_size=128, kv_bytes=2)
WIDE = Layer(num_heads=64, num_kv_heads=8, head_size=128, kv_bytes=2)


@dataclass(frozen=True)
class Shape:
    """A batch: requests in groups below one prefix.

    Attributes:
        name: for the reader.
        requests: of the batch.
        rows: query rows of each.
        prefix: tokens that all share.
        groups: of requests that share more; 1 for none.
        document: tokens that each group shares.
        own: further tokens of each request.
        layer: what attends.
    """

    name: str
    requests: int
    rows: int
    prefix: int
    groups: int = 1
    document: int = 0
    own: int = 256
    layer: Layer = LLAMA


SHAPES = (
    Shape("decode 8 x 1k", 8, 1, 1024),
    Shape("decode 8 x 4k", 8, 1, 4096),
    Shape("decode 32 x 1k", 32, 1, 1024),
    Shape("decode 32 x 4k", 32, 1, 4096),
    Shape("decode 128 x 4k", 128, 1, 4096),
    Shape("decode 32 x 32k", 32, 1, 32768),
    Shape("decode 256 x 1k + 8 documents of 4k", 256, 1, 1024, 8, 4096),
    Shape("decode 32 x 4k, 32 KV heads", 32, 1, 4096, layer=MULTI_HEAD),
    Shape("decode 32 x 4k, 64/8 heads", 32, 1, 4096, layer=WIDE),
    Shape("extend 8 x 4 over 2k", 8, 4, 2048),
    Shape("extend 32 x 16 over 4k", 32, 16, 4096),
    Shape("decode 32 x 256, own 4k", 32, 1, 256, own=4096),
    Shape("decode 2 x 512", 2, 1, 512),
    Shape("prefill 4 x 2k over 4k", 4, 2048, 4096, own=0),
    Shape("prefill 1 x 8k", 1, 8192, 0, own=0),
    Shape("nothing shared, 32 x 4k", 32, 1, 0, own=4096),
)


def make_batch(shape: Shape) -> tuple[Any, Any, Any]:
    """Return block tables [R, W], lengths [R] and query starts [R + 1]."""
    prefix, document = shape.prefix // PAGE, shape.document // PAGE
    new = shape.own + shape.rows
    width = prefix + document + -(-new // PAGE)
    blocks = np.arange(shape.requests * width, dtype=np.int32) + 1
    tables = blocks.reshape(shape.requests, width)
    tables[:, :prefix] = tables[0, :prefix]
    per_group = shape.requests // shape.groups
    for group in range(shape.groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        documents = slice(prefix, prefix + document)
        tables[rows, documents] = tables[group * per_group, documents]
    lengths = np.full(shape.requests, shape.prefix + shape.document + new)
    return tables, lengths, np.arange(shape.requests + 1) * shape.rows


@dataclass(frozen=True)
class Prediction:
    """What the model says of a shape.

    Attributes:
        stock: work of vLLM's kernel, with our tiles.
        ours: work of ours, grouped as well as can be.
        stock_s: seconds of vLLM's kernel.
        ours_s: seconds of ours.
        nodes: runs that ours reads once.
        grouped: whether the planner takes ours.
    """

    stock: Work
    ours: Work
    stock_s: float
    ours_s: float
    nodes: int
    grouped: bool

    @property
    def speedup(self) -> float:
        """Predicted gain of grouping, below 1 where it would cost."""
        return self.stock_s / self.ours_s


def predict(shape: Shape, architecture: str = "sm_90") -> Prediction:
    """Return the model's prediction for a shape on a device."""
    import torch

    layer, device = shape.layer, DEVICES[architecture]
    tile = choose(architecture, layer.head_size, layer.group, torch.bfloat16)
    limits = Limits(
        layer, device, PAGE, tile.m, max_items=1 << 20, max_partials=1 << 20
    )
    batch = make_batch(shape)
    planner = AttentionPlanner(limits)
    proposed = planner.propose(*batch)
    assert proposed is not None, "there is room for any of these"
    return Prediction(
        proposed.rival,
        proposed.work,
        seconds(device, layer, proposed.rival),
        seconds(device, layer, proposed.work),
        proposed.num_nodes,
        planner.plan(*batch) is not None,
    )


def table(architecture: str) -> Table:
    """Return the predictions for a device, a row each."""
    shown = Table(
        title=f"one layer on {architecture}, by the model: vLLM's kernel > grouped",
        caption="bf16, 16 tokens a block, 256 own tokens each unless named; "
        "x 1.00 where the step is left to vLLM",
    )
    for name in ("shape", "MB loaded", "GFLOP", "launches", "us", "", "planner"):
        shown.add_column(name, justify="left" if name == "shape" else "right")
    for shape in SHAPES:
        made = predict(shape, architecture)
        works = (made.stock, made.ours)
        loaded = [loaded_bytes(shape.layer, work) for work in works]
        flops = [operations(shape.layer, work) for work in works]
        shown.add_row(
            shape.name,
            " > ".join(f"{size / 1e6:,.1f}" for size in loaded),
            " > ".join(f"{count / 1e9:,.1f}" for count in flops),
            " > ".join(str(work.launches) for work in works),
            f"{made.stock_s * 1e6:,.1f} > {made.ours_s * 1e6:,.1f}",
            f"x {made.speedup if made.grouped else 1:.2f}",
            "grouped" if made.grouped else f"vLLM's (ours: x {made.speedup:.2f})",
        )
    return shown


def plot(architecture: str, path: Path) -> None:
    """Draw predicted gains of decoding by prefix length and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    prefixes = [2**power for power in range(8, 16)]
    for requests in (4, 8, 32, 128):
        made = [
            predict(Shape("", requests, 1, prefix), architecture) for prefix in prefixes
        ]
        gains = [one.speedup if one.grouped else 1.0 for one in made]
        axes.plot(prefixes, gains, marker="o", label=f"{requests} requests")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of the shared prefix",
        ylabel="predicted speed-up of attention",
        title=f"decoding on {architecture}: a model, not a measurement",
    )
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Print the table; draw the plot if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architecture",
        default="sm_90",
        choices=[name for name in DEVICES if name != "interpreter"],
    )
    parser.add_argument("--plot", type=Path, help="where to draw, a .png")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.plot.parent.is_dir():
        parser.error(f"--plot: {arguments.plot.parent} is no folder")
    Console(width=130).print(table(arguments.architecture))
    if arguments.plot:
        plot(arguments.architecture, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
