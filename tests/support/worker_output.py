"""What a worker reads of the scheduler's output, without vLLM."""

from types import SimpleNamespace


def worker_output(new=(), cached=(), resumed=(), finished=(), scheduled=None):
    """Return what a worker reads of a ``SchedulerOutput``."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(list(blocks),))
            for name, blocks in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            new_block_ids=[
                None if blocks is None else (list(blocks),) for _, blocks in cached
            ],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=scheduled or {},
    )
