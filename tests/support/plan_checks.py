"""What a plan must be: every key of every row once, from the row's own blocks."""

import numpy as np

from vllm_radix.attention.planner import OPEN_END


def check_plan(batch, plan, limits):
    """Fail unless the plan covers each (row, key) of a batch exactly once.

    Also: the block that an item reads is the one the row's own table names, each row's
    partials are numbered without gap or overlap, one item of a row holds its end, and
    what the plan says it loads is what its items load.
    """
    assert plan is not None, "what is shared was not grouped"
    loaded = _check_cover(batch, plan, limits)
    assert loaded == plan.work.loaded


def check_kept_plan(batch, plan, limits):
    """Fail unless a plan that was made for an earlier step covers this one.

    What it loads was counted when it was made, so that alone may differ.
    """
    _check_cover(batch, plan, limits)


def _check_cover(batch, plan, limits):
    """Check a plan against a batch; return the tokens that its items load."""
    items, rows, first = plan.items, plan.rows, plan.first
    num_rows = int(batch.starts[-1])
    assert len(rows) == num_rows
    assert len(first) == num_rows + 1
    assert sorted(rows[:, 0].tolist()) == list(range(num_rows))
    assert len(items) <= limits.max_items
    assert first[-1] <= limits.max_partials
    longest = int(batch.seq_lens.max())
    seen = np.zeros((num_rows, longest), dtype=np.int32)
    numbers = [[] for _ in range(num_rows)]
    ends = np.zeros(num_rows, dtype=np.int32)
    loaded = 0
    for table, row_start, count, start, end, number, is_last, _ in items.tolist():
        assert 0 < count <= limits.tokens_per_tile
        assert end > start
        last_position = -1
        for row in range(row_start, row_start + count):
            token, request = rows[row].tolist()
            assert batch.starts[request] <= token < batch.starts[request + 1]
            position = int(batch.seq_lens[request] - batch.starts[request + 1] + token)
            last_position = max(last_position, position)
            stop = min(end, position + 1)
            keys = np.arange(start, stop)
            theirs = batch.tables[table, keys // batch.page]
            own = batch.tables[request, keys // batch.page]
            assert np.array_equal(theirs, own), (table, request, start, end)
            seen[row, start:stop] += 1
            numbers[row].append(number)
            ends[row] += is_last
        if end == OPEN_END:
            assert is_last
        loaded += max(0, min(end, last_position + 1) - start)
    for row in range(num_rows):
        token, request = rows[row].tolist()
        position = int(batch.seq_lens[request] - batch.starts[request + 1] + token)
        assert (seen[row, : position + 1] == 1).all(), (row, request)
        assert not seen[row, position + 1 :].any()
        parts = int(first[row + 1] - first[row])
        expected = list(range(len(numbers[row])))
        assert sorted(numbers[row]) == expected, row
        assert parts == (len(expected) if len(expected) > 1 else 0)
    assert (ends == 1).all()
    return loaded


def shared_tokens(batch, request, other):
    """Return the tokens that two requests may share, by brute force."""

    def full(r):
        return int(batch.seq_lens[r] - batch.rows[r]) // batch.page

    count = 0
    for mine, theirs in zip(
        batch.tables[request, : full(request)],
        batch.tables[other, : full(other)],
        strict=False,
    ):
        if mine != theirs:
            break
        count += 1
    return count * batch.page


def stock_loaded(batch, rows_per_tile):
    """Return the tokens that a kernel loads which reads each request by itself."""
    total = 0
    for length, rows in zip(batch.seq_lens.tolist(), batch.rows.tolist(), strict=True):
        for start in range(0, rows, rows_per_tile):
            total += length - rows + min(start + rows_per_tile, rows)
    return total
