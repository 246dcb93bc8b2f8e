"""The plan on the device: buffers that stay where they are from step to step."""

import torch

from vllm_radix.attention.cost import Layer
from vllm_radix.attention.forest import Ints
from vllm_radix.attention.planner import ITEM, PROGRAMS, Limits, Plan
from vllm_radix_kernels.grouped_attention import DevicePlan
from vllm_radix_kernels.tiles import Tile

PARTIAL_MEMORY = 64 << 20
"""Bytes for partial results; a step that needs more is vLLM's."""


def max_partials(layer: Layer) -> int:
    """Return how many rows' partial results there is memory for."""
    return PARTIAL_MEMORY // (layer.partial_bytes // 2)


class PlanBuffers:
    """Room for any plan within limits, written only when the plan changes.

    Args:
        limits: of the planner.
        tile: of the kernel; its rows are the limits' ``tile_rows``.
        device: where the kernel runs.

    Attributes:
        plan: what the kernel takes; the same tensors always.
        uploads: plans written so far.
    """

    def __init__(self, limits: Limits, tile: Tile, device: torch.device) -> None:
        layer = limits.layer
        self.uploads = 0
        self._serial = 0
        self._pin = device.type != "cpu"

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.plan = DevicePlan(
            items=ints(limits.max_items, ITEM),
            rows=ints(limits.max_tokens, 2),
            first=ints(limits.max_tokens + 1),
            num_items=ints(1),
            part=floats(limits.max_partials, layer.num_heads, layer.head_size),
            lse=floats(limits.max_partials, layer.num_heads),
            tile=tile,
            # A program walks items a stride apart: more of them even out lengths.
            programs=PROGRAMS * limits.device.processors,
            num_rows=0,
        )

    def load(self, plan: Plan) -> DevicePlan:
        """Write a plan, unless it is the one written last; O(its size).

        The copy is ordered on the current stream: kernels launched before it still
        read the plan they were launched with.
        """
        if plan.serial != self._serial:
            device = self.plan
            self._copy(plan.items, device.items)
            self._copy(plan.rows, device.rows)
            self._copy(plan.first, device.first)
            # Rows beyond the plan's have no partials: a launch may cover them.
            device.first[len(plan.first) :].fill_(plan.num_partials)
            device.num_items.fill_(len(plan.items))
            device.num_rows = len(plan.rows)
            self._serial = plan.serial
            self.uploads += 1
        return self.plan

    def _copy(self, source: Ints, target: torch.Tensor) -> None:
        host = torch.from_numpy(source)
        # Pinned memory is fresh each time: torch keeps it until the copy is done.
        host = host.pin_memory() if self._pin else host
        target[: len(host)].copy_(host, non_blocking=True)
