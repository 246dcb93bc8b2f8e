"""The host's block tables, and whose rows are whose, for both model runners."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.worker_output import worker_output
from vllm_radix.attention.batch import RunningBatch
from vllm_radix.attention.block_tables import HostBlockTables


@pytest.mark.parametrize("seed", range(5))
def test_tables_follow_the_scheduler(seed):
    rng = random.Random(seed)
    tables, model, count = HostBlockTables(40), {}, 0
    for _ in range(300):
        finished = [name for name in model if rng.random() < 0.05]
        for name in finished:
            del model[name]
        new = []
        for _ in range(rng.randrange(4)):
            blocks = [rng.randrange(1, 999) for _ in range(rng.randrange(1, 20))]
            # Now and then a known name with other blocks: a session's next input.
            name = rng.choice([*model, f"r{count}"]) if model else f"r{count}"
            count += 1
            if all(name != known for known, _ in new):
                new.append((name, blocks))
        cached, resumed = [], set()
        for name in model:
            if any(name == known for known, _ in new):
                continue
            choice = rng.random()
            room = 40 - len(model[name])
            if choice < 0.1:
                blocks = [rng.randrange(1, 999) for _ in range(3)]
                cached.append((name, blocks))
                resumed.add(name)
                model[name] = blocks
            elif choice < 0.5 and room:
                blocks = [rng.randrange(1, 999)]
                cached.append((name, blocks))
                model[name] = model[name] + blocks
            else:
                cached.append((name, None))
        model |= dict(new)
        tables.update(worker_output(new, cached, resumed, finished))
        assert len(tables) == len(model)
        names = rng.sample(sorted(model), len(model))
        gathered = tables.gather(names)
        for row, name in zip(gathered, names, strict=True):
            assert row[: len(model[name])].tolist() == model[name]
    assert tables.gather([*model, "unknown"]) is None


def test_more_requests_than_there_was_room_for():
    tables = HostBlockTables(3)
    tables.update(worker_output(new=[(str(i), [i, i + 1]) for i in range(200)]))
    gathered = tables.gather([str(i) for i in range(200)])
    assert np.array_equal(gathered[:, 0], np.arange(200))


def test_more_blocks_than_the_longest_request_has():
    tables = HostBlockTables(3)
    tables.update(worker_output(new=[("a", [1, 2, 3]), ("b", [4])]))
    tables.update(worker_output(cached=[("a", [5, 6]), ("b", None)]))
    assert tables.gather(["b", "a"]).tolist() == [[4, 0, 0, 0, 0], [1, 2, 3, 5, 6]]


def common(starts, req_idx=None):
    return SimpleNamespace(
        query_start_loc_cpu=torch.tensor(starts),
        req_idx=None if req_idx is None else np.array(req_idx),
    )


def started(names, rows, runner):
    batch = RunningBatch(8, strict=True)
    new = [(name, [1]) for name in names]
    batch.begin(
        worker_output(new, scheduled=dict(zip(names, rows, strict=True))), runner
    )
    return batch


def test_rows_of_the_first_model_runner():
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    batch = started(["a", "b"], [3, 1], runner)
    assert batch.request_ids(common([0, 1, 4])) == ["b", "a"]
    # Padded for a graph: requests without rows.
    assert batch.request_ids(common([0, 1, 4, 4, 4])) == ["b", "a"]


def test_rows_of_the_second_model_runner():
    states = SimpleNamespace(index_to_req_id={7: "a", 2: "b"})
    batch = started(["a", "b"], [3, 1], SimpleNamespace(req_states=states))
    assert batch.request_ids(common([0, 1, 4], [2, 7])) == ["b", "a"]
    assert batch.request_ids(common([0, 3, 4], [7, 2])) == ["a", "b"]
    assert batch.request_ids(common([0, 3, 4], [7, 5])) is None


@pytest.mark.parametrize(
    "starts",
    [
        [0, 1, 2],  # a drafter's pass: one row each
        [0, 1],  # a slice of the batch
        [0, 1, 4, 6],  # somebody else's rows behind
        [0, 3, 4],  # in another order
    ],
)
def test_rows_that_are_not_the_schedulers_have_no_plan(starts):
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    batch = started(["a", "b"], [3, 1], runner)
    assert batch.request_ids(common(starts)) is None


def test_between_steps_nothing_is_planned():
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]))
    batch = started(["a"], [1], runner)
    assert batch.request_ids(common([0, 1])) == ["a"]
    batch.end()
    assert batch.request_ids(common([0, 1])) is None
