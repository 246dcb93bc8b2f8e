"""Fit the cost model's constants of an H100 to what ``make bench-attention`` measured.

    python tools/gpu/fit_cost.py RESULT.json

Prints for each shape the times measured, those that the model predicted when they were
(they are in the result) and those that ``vllm_radix/attention/cost.py`` predicts now,
what the planner chose and chooses, and the constants that fit best: those with the
least mean square of the logarithm of predicted over measured.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_radix.attention.cost import DEVICES, Device, Work, seconds
from vllm_radix.attention.plan_buffers import max_partials
from vllm_radix.attention.planner import AttentionPlanner, Limits
from vllm_radix_bench.attention.batches import PAGE, Shape, host_batch
from vllm_radix_bench.attention.implementations import OURS, VLLM
from vllm_radix_kernels.tiles import choose

GRID: dict[str, Any] = {
    "memory": np.arange(2.2e12, 3.01e12, 0.1e12),
    "cache": np.arange(4.0e12, 4.7e12, 0.05e12),
    "stream": np.arange(10e9, 12.6e9, 0.25e9),
    "launch_s": np.arange(4e-6, 12.1e-6, 1e-6),
}


@dataclass(frozen=True)
class Measured:
    """A shape's times, and what the kernels do for it.

    Attributes:
        shape: of the batch.
        stock_s: seconds of vLLM's kernel.
        ours_s: seconds of ours; None where it was not timed.
        stock: work of vLLM's kernel.
        ours: work of the best plan, whether it was taken or not.
        rival: what that plan must beat.
        before: seconds predicted at the time, of vLLM's kernel and of ours.
        taken: whether the planner took ours at the time.
    """

    shape: Shape
    stock_s: float
    ours_s: float | None
    stock: Work
    ours: Work
    rival: Work
    before: tuple[float, float | None]
    taken: bool

    def speedup(self, device: Device) -> float:
        """Return the gain that the planner would predict."""
        layer = self.shape.layer
        return seconds(device, layer, self.rival) / seconds(device, layer, self.ours)

    def errors(self, device: Device) -> list[float]:
        """Return the logarithms of predicted over measured."""
        layer, out = self.shape.layer, []
        for work, measured in ((self.stock, self.stock_s), (self.ours, self.ours_s)):
            if measured is not None:
                out.append(math.log(seconds(device, layer, work) / measured))
        return out


def read(path: Path) -> list[Measured]:
    """Return the shapes of a result of the timing stage."""
    out = []
    for entry in json.loads(path.read_text()).values():
        row = entry.get("row") if isinstance(entry, dict) else None
        if row is None or VLLM not in row["contenders"]:
            continue
        names = Shape.__dataclass_fields__
        shape = Shape(**{name: row[name] for name in names})
        found = row["contenders"]
        timed = found[OURS].get("cold_s")
        layer = shape.layer
        tile = choose("sm_90", shape.head_size, layer.group, torch.bfloat16)
        limits = Limits(
            layer,
            DEVICES["sm_90"],
            PAGE,
            tile.m,
            max_partials=max_partials(layer),
        )
        plan = AttentionPlanner(limits).propose(*host_batch(shape)[1])
        assert plan is not None, "there was room on the device"
        out.append(
            Measured(
                shape,
                found[VLLM]["cold_s"]["median"],
                timed and timed["median"],
                shape.stock_work(16),
                plan.work,
                plan.rival,
                (found[VLLM]["predicted_s"], found[OURS].get("predicted_s")),
                not row["speedup"]["declined"],
            )
        )
    return out


def root_mean_square(rows: list[Measured], device: Device) -> float:
    """Return the mean error as a factor; 1 is none."""
    return spread([error for row in rows for error in row.errors(device)])


def spread(errors: list[float]) -> float:
    """Return the root of the mean square of logarithms, as a factor."""
    return math.exp(math.sqrt(sum(error**2 for error in errors) / len(errors)))


def fit(rows: list[Measured], device: Device) -> Device:
    """Return the device of the grid that fits best."""

    def made(values: tuple[Any, ...]) -> Device:
        named: dict[str, Any] = dict(zip(GRID, map(float, values), strict=True))
        return replace(device, **named)

    grid = map(made, itertools.product(*GRID.values()))
    return min(grid, key=lambda one: root_mean_square(rows, one))


def show(rows: list[Measured], device: Device) -> None:
    """Print measured and predicted times, and who is chosen."""
    head = "us: measured, predicted then > now"
    print(f"{head:58} {'vLLM':>24} {'ours':>24} speed-up")
    for row in rows:
        layer, cells = row.shape.layer, []
        for work, measured, then in (
            (row.stock, row.stock_s, row.before[0]),
            (row.ours, row.ours_s, row.before[1]),
        ):
            now = f"{1e6 * seconds(device, layer, work):6.1f}"
            if measured is None or then is None:
                cells.append(f"not timed > {now}")
            else:
                cells.append(f"{1e6 * measured:6.1f}, {1e6 * then:6.1f} > {now}")
        gains = ["-", "-", f"{row.speedup(device):.2f}"]
        if row.ours_s is not None and row.before[1] is not None:
            gains[0] = f"{row.stock_s / row.ours_s:.2f}"
            gains[1] = f"{row.before[0] / row.before[1]:.2f}"
        sides = ["vLLM's", "ours"]
        then_side, now_side = (
            sides[taken] for taken in (row.taken, row.speedup(device) > device.margin)
        )
        side = now_side if then_side == now_side else f"{then_side} > {now_side}"
        print(
            f"{row.shape!s:58} {cells[0]:>24} {cells[1]:>24} "
            f"{gains[0]:>5}, {gains[1]:>5} > {gains[2]:>5} {side}"
        )
    past = [
        math.log(predicted / measured)
        for row in rows
        for predicted, measured in zip(
            row.before, (row.stock_s, row.ours_s), strict=True
        )
        if predicted is not None and measured is not None
    ]
    print(f"then: off by a factor of {spread(past):.3f}")
    print(f"now: off by a factor of {root_mean_square(rows, device):.3f}")


def main() -> None:
    """Print what the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    rows = read(parser.parse_args().result)
    device = DEVICES["sm_90"]
    show(rows, device)
    best = fit(rows, device)
    print(f"best: off by a factor of {root_mean_square(rows, best):.3f}: {best}")


if __name__ == "__main__":
    main()
