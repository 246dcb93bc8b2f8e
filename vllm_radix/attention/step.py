"""What a worker knows of the step it runs: whose rows are whose, and their blocks."""

import itertools
from typing import Any

from vllm_radix.attention.tables import HostTables


class Statistics:
    """Counts of grouped attention since the worker started.

    Attributes:
        steps: steps whose attention was planned.
        grouped_steps: those that read a shared run once.
        grouped_extends: those of them in which a request had several query rows.
        nodes: runs read once, summed over steps.
        levels: most such runs on one request's path.
        loaded_tokens: tokens of keys that grouped steps loaded, per layer.
        stock_tokens: tokens that vLLM's kernel would have loaded for them.
        plans_made: plans for a batch that was new.
        plans_kept: steps that went on with the plan before.
    """

    def __init__(self) -> None:
        self.steps = self.grouped_steps = self.grouped_extends = 0
        self.nodes = self.levels = 0
        self.loaded_tokens = self.stock_tokens = 0
        self.plans_made = self.plans_kept = 0

    def to_dict(self) -> dict[str, int]:
        """Return the counts as a plain dict."""
        return dict(vars(self))


class Step:
    """The worker's current step; metadata builders ask it.

    Args:
        max_blocks: blocks of a request, at most.
        strict: refuse layers that cannot be served, instead of leaving them to vLLM.

    Attributes:
        statistics: what was planned so far.
        builders: the metadata builders that plan.
        enabled: False leaves every step to vLLM.
    """

    def __init__(self, max_blocks: int, strict: bool) -> None:
        self.tables = HostTables(max_blocks)
        self.strict = strict
        self.statistics = Statistics()
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
        """Nothing is running: what is built now is no request's (a dummy run)."""
        self._scheduled = {}

    def request_ids(self, common: Any) -> list[str] | None:
        """Return the requests of a batch's rows, in order; None if they are not known.

        They are known if each has as many query rows in the metadata as the scheduler
        gave it: most drafts' passes and slices of a batch do not. Metadata that vLLM
        derives for chunks of keys may; its builders are told apart (``backend.py``).

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
            batch = getattr(self.runner, "input_batch", None)
            if batch is None:
                # Runner V2, and metadata that was derived from a step's.
                return None
            ids = list(batch.req_ids)
        starts = common.query_start_loc_cpu.tolist()
        count = len(ids)
        if len(starts) <= count or starts[count] != starts[-1]:
            return None
        scheduled = [self._scheduled.get(request_id) for request_id in ids]
        rows = [end - start for start, end in itertools.pairwise(starts)]
        return ids if scheduled == rows[:count] else None


_current: Step | None = None


def current() -> Step | None:
    """Return this process's worker's step; None where attention is not grouped."""
    return _current


def install(step: Step | None) -> None:
    """Make a step this process's."""
    global _current
    _current = step
