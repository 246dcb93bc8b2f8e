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
    from vllm_radix.attention.plan import Planner

    plan = Planner.plan

    def wrong(self: Any, *args: Any) -> Any:
        made = plan(self, *args)
        if made is None:
            return None
        # Another number, or the right plan may be on the device already.
        return dataclasses.replace(made, items=made.items[:-1], serial=-made.serial)

    with mock.patch.object(Planner, "plan", wrong):
        yield


@contextlib.contextmanager
def resumed_requests_keep_their_old_blocks(_: Any) -> Iterator[None]:
    """Let the host's block tables miss that a preempted request got others.

    For model runner V2 a resumed request is a new one, under an id that is known.
    """
    from vllm_radix.attention.tables import HostTables

    update = HostTables.update

    def wrong(self: Any, output: Any) -> None:
        new = [one for one in output.scheduled_new_reqs if one.req_id not in self._rows]
        with mock.patch.object(output, "scheduled_new_reqs", new):
            update(self, output)

    with mock.patch.object(HostTables, "update", wrong):
        yield
