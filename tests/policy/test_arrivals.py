"""The table of waiting requests, against a dict of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import ArrivalTable

UNHURRIED = settings(deadline=None)
OPERATION = st.one_of(
    st.tuples(st.just("add"), st.sampled_from([1, 1, 1, 2, 40, 500])),
    st.tuples(st.just("add"), st.just(1)),
    st.tuples(st.just("remove"), st.integers(0, 99)),
    st.tuples(st.just("remove oldest"), st.integers(1, 30)),
)


class Model:
    """The table and what it should hold: work and blocks, by arrival."""

    def __init__(self, first=0):
        self.table = ArrivalTable()
        self.waiting = {}
        self.next = first

    def add(self, gap=1, work=0, blocks=0):
        self.next += gap - 1
        self.table.add(self.next, work, blocks)
        self.waiting[self.next] = (work, blocks)
        self.next += 1

    def remove(self, arrival):
        self.table.remove(arrival)
        del self.waiting[arrival]

    def verify(self):
        table, waiting = self.table, self.waiting
        work, waits = table.rows()
        assert len(work) == len(waits)
        rows = [row for row, here in enumerate(waits.tolist()) if here]
        assert [table.first + row for row in rows] == sorted(waiting)
        assert [int(work[row]) for row in rows] == [
            waiting[arrival][0] for arrival in sorted(waiting)
        ]
        blocks = [blocks for _, blocks in waiting.values()]
        mean = sum(blocks) / len(blocks) if blocks else 0.0
        assert table.mean_blocks() == pytest.approx(mean)
        places = {0, self.next, self.next + 70, *sorted(waiting)[:4]}
        for arrival in places | {arrival + 1 for arrival in places}:
            older = [other for other in waiting if other < arrival]
            assert table.num_older(arrival) == len(older)
            for after in (-1, *sorted(places)):
                expected = sum(
                    blocks
                    for other, (_, blocks) in waiting.items()
                    if after < other < arrival
                )
                assert table.blocks_between(after, arrival) == expected


@UNHURRIED
@given(st.integers(0, 100), st.lists(OPERATION, max_size=60))
def test_arrival_table_any_operations_equals_dict(first, operations):
    model = Model(first)
    for count, (name, number) in enumerate(operations):
        waiting = sorted(model.waiting)
        if name == "add":
            model.add(number, work=7 * count, blocks=count % 5)
        elif waiting and name == "remove":
            model.remove(waiting[number % len(waiting)])
        elif name == "remove oldest":
            for arrival in waiting[:number]:
                model.remove(arrival)
        model.verify()


@pytest.mark.parametrize("kept", [0, 1, 10, 63])
def test_arrival_table_long_queue_drops_rows_of_those_gone(kept):
    model = Model()
    for number in range(2000):
        model.add(work=number, blocks=number % 7)
        if number >= kept:
            model.remove(number - kept)
        if number % 61 == 0:
            model.verify()
    model.verify()
    assert len(model.table.rows()[0]) <= 2 * max(kept, 64)


def test_arrival_table_oldest_stays_keeps_all_rows():
    model = Model()
    for number in range(500):
        model.add(work=number, blocks=1)
        if number:
            model.remove(number)
    model.verify()
    assert model.table.first == 0


def test_arrival_table_emptied_starts_again_at_a_later_arrival():
    model = Model()
    for _ in range(64):
        model.add(blocks=1)
    for arrival in range(64):
        model.remove(arrival)
    model.add(gap=10_000, work=5, blocks=3)
    model.verify()
    assert model.table.blocks_between(-1, 10**6) == 3


def test_arrival_table_arrival_again_is_refused():
    table = ArrivalTable()
    table.add(3, 0, 0)
    with pytest.raises(AssertionError, match="arrivals grow"):
        table.add(3, 0, 0)
