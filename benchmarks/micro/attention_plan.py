"""CPU time of planning attention, per decode step.

    make bench

256 requests of about 512 blocks of 16 tokens decode, in a forest of three levels, on
the H100's limits; every so many steps one ends and another takes its place. Timed is
what a worker adds to a step: the scheduler's block ids are taken in, the batch's tables
gathered, the plan looked up or made. Thread-CPU time; the mean is the amortised cost.
"""

import time
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_radix.attention.block_tables import HostBlockTables
from vllm_radix.attention.cost import DEVICES, Layer
from vllm_radix.attention.planner import AttentionPlanner, Limits

REQUESTS, BLOCKS, SIZE = 256, 512, 16
STEPS = 400
GOAL_MS = 1.0
LAYER = Layer(num_heads=32, num_kv_heads=8, head_size=128, kv_bytes=2)


class Decoding:
    """A batch that decodes, as a scheduler describes it to its workers.

    Args:
        turnover: steps from one request's end to the next.
        shared: blocks of the system prompt and of each of eight documents; (0, 0)
            for nothing shared.
    """

    def __init__(self, turnover: int, shared: tuple[int, int]) -> None:
        self.rng = np.random.default_rng(0)
        self.turnover = turnover
        self.next_block = 1
        self.system = self._blocks(shared[0])
        self.documents = [self._blocks(shared[1]) for _ in range(8)]
        self.names: list[str] = []
        self.used: dict[str, int] = {}
        self.lengths = np.zeros(REQUESTS, dtype=np.int32)
        self.steps = self.joined = 0
        self.starts = np.arange(REQUESTS + 1, dtype=np.int32)

    def step(self) -> Any:
        """Return the step's ``SchedulerOutput``, what workers read of it."""
        new, finished = [], set()
        while len(self.names) < REQUESTS:
            new.append(self._join(len(self.names)))
        if self.steps and self.steps % self.turnover == 0:
            # The last one moves to the place of the one that ended.
            place = int(self.rng.integers(REQUESTS))
            finished.add(self.names[place])
            last = self.names.pop()
            if place < REQUESTS - 1:
                self.names[place] = last
                self.lengths[place] = self.lengths[-1]
            new.append(self._join(REQUESTS - 1))
        self.steps += 1
        joined = {request.req_id for request in new}
        grown = [
            name
            for name, length in zip(self.names, self.lengths.tolist(), strict=True)
            if name not in joined and -(-(length + 1) // SIZE) > self.used[name]
        ]
        for name in grown:
            self.used[name] += 1
        self.lengths += 1
        return SimpleNamespace(
            finished_req_ids=finished,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=grown,
                new_block_ids=[(self._blocks(1),) for _ in grown],
                resumed_req_ids=set(),
            ),
        )

    def _blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def _join(self, place: int) -> Any:
        name = f"r{self.joined}"
        blocks = self.system + self.documents[self.joined % 8]
        blocks = blocks + self._blocks(BLOCKS - 30 - len(blocks))
        self.joined += 1
        self.names.append(name)
        self.used[name] = len(blocks)
        self.lengths[place] = len(blocks) * SIZE - int(self.rng.integers(SIZE))
        return SimpleNamespace(req_id=name, block_ids=(blocks,))


def measure(
    turnover: int, shared: tuple[int, int]
) -> tuple[list[float], AttentionPlanner]:
    """Return each step's milliseconds, the first one left out, and the planner."""
    limits = Limits(LAYER, DEVICES["sm_90"], SIZE, tile_rows=64)
    planner, tables = AttentionPlanner(limits), HostBlockTables(BLOCKS)
    batch = Decoding(turnover, shared)
    times = []
    for _ in range(STEPS):
        output = batch.step()
        start = time.thread_time()
        tables.update(output)
        gathered = tables.gather(batch.names)
        assert gathered is not None
        plan = planner.plan(gathered, batch.lengths, batch.starts)
        times.append((time.thread_time() - start) * 1e3)
        assert (plan is not None) == bool(shared[0])
    return times[1:], planner


def main() -> None:
    """Print the table."""
    table = Table(
        title=f"planning, ms of CPU a decode step, {REQUESTS} requests x {BLOCKS} "
        f"blocks (goal: {GOAL_MS:g} amortised)"
    )
    for name in ("batch", "amortised", "median", "99th percentile", "made", "kept"):
        table.add_column(name, justify="right")
    for label, turnover, shared in (
        ("a request ends every 4 steps", 4, (192, 192)),
        ("every 16 steps", 16, (192, 192)),
        ("none ends", STEPS + 1, (192, 192)),
        ("nothing shared, every 4 steps", 4, (0, 0)),
    ):
        times, planner = measure(turnover, shared)
        table.add_row(
            label,
            f"{mean(times):.2f}",
            f"{median(times):.2f}",
            f"{np.percentile(times, 99):.2f}",
            f"{planner.made + planner.refreshed}",
            f"{planner.kept}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
