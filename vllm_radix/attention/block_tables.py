"""Block tables on the host, from what the scheduler tells the workers.

vLLM's newer model runner keeps block tables on the device only, and a copy back would
stall it. The scheduler sends every block id once; this keeps them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_radix.attention.forest import Ints


class HostBlockTables:
    """Keeps the block ids of each live request, one row each.

    Args:
        max_blocks: blocks of a request, as a rule at most.
        group: which KV cache group's blocks.
    """

    def __init__(self, max_blocks: int, group: int = 0) -> None:
        self._group = group
        self._tables = np.zeros((64, max_blocks), dtype=np.int32)
        self._used: list[int] = [0] * 64
        self._free = list(range(63, -1, -1))
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def update(self, output: Any) -> None:
        """Take in a step's ``SchedulerOutput``; O(requests that ended or got blocks).

        A request that was preempted keeps its row until it is resumed, with other
        blocks then, or ends.
        """
        for request_id in output.finished_req_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._free.append(row)
        for new in output.scheduled_new_reqs:
            self._write(self._row_of(new.req_id), 0, new.block_ids[self._group])
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(
            cached.req_ids, cached.new_block_ids, strict=True
        ):
            if blocks is not None:
                row = self._row_of(request_id)
                resumed = request_id in cached.resumed_req_ids
                start = 0 if resumed else self._used[row]
                self._write(row, start, blocks[self._group])

    def gather(self, request_ids: Sequence[str]) -> Ints | None:
        """Return [R, W] block ids, rows as asked; None if one is not known."""
        try:
            rows = [self._rows[request_id] for request_id in request_ids]
        except KeyError:
            return None
        # No wider than the longest request needs, and in steps, so that a batch that
        # grows keeps its shape.
        widest = max((self._used[row] for row in rows), default=0)
        width = min(-(-widest // 64) * 64, self._tables.shape[1])
        return self._tables[rows, :width]

    def _row_of(self, request_id: str) -> int:
        row = self._rows.get(request_id)
        if row is None:
            if not self._free:
                size = len(self._used)
                self._tables = np.concatenate(
                    [self._tables, np.zeros_like(self._tables)]
                )
                self._used += [0] * size
                self._free = list(range(2 * size - 1, size - 1, -1))
            row = self._rows[request_id] = self._free.pop()
            self._used[row] = 0
        return row

    def _write(self, row: int, start: int, blocks: Sequence[int]) -> None:
        end = start + len(blocks)
        missing = end - self._tables.shape[1]
        if missing > 0:
            # Blocks for drafts may lie beyond the longest request's.
            self._tables = np.pad(self._tables, ((0, 0), (0, missing)))
        self._tables[row, start:end] = blocks
        self._used[row] = end
