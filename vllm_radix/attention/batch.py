"""The batch that a worker runs: which request each row belongs to, and its blocks."""

import itertools
from typing import Any

from vllm_radix.attention.block_tables import HostBlockTables
from vllm_radix.attention.statistics import GroupingCounters


class RunningBatch:
    """The worker's current batch, for its metadata builders.

    Args:
        max_blocks: blocks of a request, at most.
        strict: refuse layers that cannot be served, instead of leaving them to vLLM.

    Attributes:
        counters: what was planned so far.
        builders: the metadata builders that plan.
        enabled: False leaves every step to vLLM.
    """

    def __init__(self, max_blocks: int, strict: bool) -> None:
        self.tables = HostBlockTables(max_blocks)
        self.strict = strict
        self.counters = GroupingCounters()
        self.runner: Any = None
        self.builders: list[Any] = []
        self.enabled = True
        self._scheduled: dict[str, int] = {}

    def begin(self, output: Any, runner: Any) -> None:
        """Take in what the scheduler sent for the step that runs now."""
        self.tables.update(output)
        self.runner = runner
        self._scheduled = output.num_scheduled_tokens

    def end(self) -> None:
        """Mark the step as finished.

        Metadata that is built until the next ``begin`` belongs to dummy runs and is
        not planned.
        """
        self._scheduled = {}

    def request_ids(self, common: Any) -> list[str] | None:
        """Return the requests of a batch's rows, in order; None if they are not known.

        They are known if each has as many query rows in the metadata as the scheduler
        gave it: most drafts' passes and slices of a batch do not. Metadata that vLLM
        derives for chunks of keys may; ``backends/base.py`` tells its builders apart.

        Args:
            common: vLLM's ``CommonAttentionMetadata``.
        """
        if not self._scheduled or not self.enabled:
            return None
        if common.req_idx is not None:
            # Model runner V2: rows of its own request table.
            names = self.runner.req_states.index_to_req_id
            ids = [names.get(index) for index in common.req_idx.tolist()]
        else:
            rows_of_runner = getattr(self.runner, "input_batch", None)
            if rows_of_runner is None:
                # Runner V2, and metadata that was derived from a step's.
                return None
            ids = list(rows_of_runner.req_ids)
        starts = common.query_start_loc_cpu.tolist()
        count = len(ids)
        if len(starts) <= count or starts[count] != starts[-1]:
            return None
        scheduled = [self._scheduled.get(request_id) for request_id in ids]
        rows = [end - start for start, end in itertools.pairwise(starts)]
        return ids if scheduled == rows[:count] else None


_current: RunningBatch | None = None


def current_batch() -> RunningBatch | None:
    """Return the batch of this process's worker; None if attention is not grouped."""
    return _current


def set_current_batch(batch: RunningBatch | None) -> None:
    """Make a batch this process's."""
    global _current
    _current = batch
