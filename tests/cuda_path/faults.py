"""Faults to plant in a running arm for one job: the tier must see each of them.

Context managers, named in a job's ``within``; they get the arm.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def a_match_goes_on_for_a_block_too_many(arm: Any) -> Iterator[None]:
    """Let a look-up return another block behind those that it found."""
    pool = arm.scheduler.kv_cache_manager.block_pool
    match = pool.match

    def wrong(request: Any, limit: int, **options: Any) -> Any:
        found = match(request, limit, **options)
        room = limit - (len(found.blocks) + 1) * pool.hash_block_size
        if not found.blocks or room < 0:
            return found
        return found._replace(blocks=(*found.blocks, found.blocks[0]), partial=None)

    with mock.patch.object(pool, "match", wrong):
        yield


@contextlib.contextmanager
def blocks_are_not_copied(arm: Any) -> Iterator[None]:
    """Let the worker not hear of the copies that hits inside blocks need."""
    schedule = arm.scheduler.schedule

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        output.kv_cache_block_copies = None
        return output

    with mock.patch.object(arm.scheduler, "schedule", wrong):
        yield


@contextlib.contextmanager
def a_plan_drops_an_item(_: Any) -> Iterator[None]:
    """Let a grouped step leave one range of keys unread."""
    from vllm_radix.attention.planner import AttentionPlanner

    plan = AttentionPlanner.plan

    def wrong(self: Any, *args: Any) -> Any:
        made = plan(self, *args)
        if made is None:
            return None
        # Another number, or the right plan may be on the device already.
        return dataclasses.replace(made, items=made.items[:-1], serial=-made.serial)

    with mock.patch.object(AttentionPlanner, "plan", wrong):
        yield


@contextlib.contextmanager
def tables_are_the_neighbours(_: Any) -> Iterator[None]:
    """Let the planner take each request for the one before it in the batch."""
    import numpy as np

    from vllm_radix.attention.block_tables import HostBlockTables

    gather = HostBlockTables.gather

    def wrong(self: Any, request_ids: Any) -> Any:
        tables = gather(self, request_ids)
        return None if tables is None else np.roll(tables, 1, axis=0)

    with mock.patch.object(HostBlockTables, "gather", wrong):
        yield
