"""Whole runs: requests come, are planned and admitted; how long does each wait?"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import (
    ORDERS,
    Backlog,
    Bounds,
    Planner,
    Room,
    Turns,
    Waiting,
    view_of,
)
from vllm_radix.tree import BYTES_PER_TOKEN, encode

SIZE = 2
UNHURRIED = settings(deadline=None, max_examples=40)
LOOSE = Bounds(10**9, 1e9, 1e9)


def common(one, two):
    count = 0
    while one[: count + 1] == two[: count + 1] and count < min(len(one), len(two)):
        count += 1
    return count


class Run:
    """A queue before a cache that holds the texts of the last few admitted.

    Attributes:
        overtaken: by arrival: later ones that departed first.
        waited: by arrival: seconds from arrival to departure.
        extra: by arrival: seconds from its turn to departure.
        passed: by arrival: admissions while it waited.
    """

    def __init__(self, policy, bounds, pool=10**6, pace=0.0, limit=0.0):
        self.planner = Planner(ORDERS[policy](), bounds, pool)
        self.backlog = Backlog(SIZE * BYTES_PER_TOKEN)
        self.turns = Turns()
        self.pace, self.limit = pace, limit
        self.now = 0.0
        self.waiting = {}
        self.departed, self.times, self.warm = [], [], []
        self.overtaken, self.waited, self.extra, self.passed = {}, {}, {}, {}
        self.arrived = 0

    def add(self, text):
        key = encode([ord(letter) for letter in text for _ in range(SIZE)])
        tokens = len(text) * SIZE + 1
        entry = Waiting(text, self.arrived, self.now, key=key, tokens=tokens)
        entry.work, entry.blocks = int(self.now), len(text) + 1
        self.arrived += 1
        self.overtaken[entry.arrival] = self.passed[entry.arrival] = 0
        self.waiting[entry.arrival] = entry
        self.backlog.add(entry)
        return entry.arrival

    def step(self, slots, blocks=10**6):
        """Plan and admit, as vLLM does: in order, as long as it fits."""
        for entry in self.backlog.entries:
            entry.cached = max((common(entry.id, o) for o in self.warm), default=0)
        view = view_of(self.backlog, int(self.now), SIZE, self.pace)
        room = Room(slots, 10**6, blocks)
        entries = list(self.backlog.entries)
        picks = self.planner.plan(view, room, self.turns, self.now, self.limit)
        planned = [entries[pick.place] for pick in picks]
        admitted = 0
        for entry in planned:
            known = max((common(entry.id, o) for o in self.warm), default=0)
            blocks -= entry.blocks - known
            if blocks < 0:
                break
            self._admit(entry)
            admitted += 1
        if admitted:
            oldest = min(self.waiting, default=self.arrived)
            self.turns.depart(self.now, admitted, oldest)
        for entry in planned[:admitted]:
            self.extra[entry.arrival] = self.late(entry.arrival)
        return [entry.arrival for entry in planned]

    def late(self, arrival):
        """Seconds since a request's turn came."""
        return self.now - self.times[arrival] if arrival < len(self.times) else 0.0

    def _admit(self, entry):
        self.planner.admitted(entry.arrival == min(self.waiting))
        del self.waiting[entry.arrival]
        self.backlog.remove(entry)
        for other in self.waiting:
            self.overtaken[other] += other < entry.arrival
            self.passed[other] += 1
        self.departed.append(entry.arrival)
        self.times.append(self.now)
        self.waited[entry.arrival] = self.now - entry.since
        self.warm = [*self.warm[-3:], entry.id]


def test_ten_that_do_not_fit_stop_nobody():
    run = Run("lpm", LOOSE)
    for text in ("x", *("x" + letter * 9 for letter in "abcdefghij"), "q"):
        run.add(text)
    assert run.step(2, blocks=6) == [0, 11]


STEPS = st.lists(
    st.tuples(
        st.lists(st.text("xyz", max_size=3), max_size=4),
        st.integers(1, 3),
        st.integers(0, 8),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
    max_size=15,
)


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(steps=STEPS, most=st.integers(0, 4), tight=st.booleans())
def test_nobody_is_overtaken_more_often_than_allowed(policy, steps, most, tight):
    run = Run(policy, Bounds(most, 1e9, 1e9))
    for texts, slots, blocks, _ in steps:
        for text in texts:
            run.add(text)
        run.step(slots, blocks if tight else 10**6)
        assert max(run.overtaken.values(), default=0) <= most
        for older, arrival in enumerate(sorted(run.waiting)):
            assert run.turns.overtaken(arrival, older) == run.overtaken[arrival]


def test_the_bound_is_used_up():
    run = Run("lpm", Bounds(3, 1e9, 1e9))
    for text in ("xx", "a", "xx", "xy", "xz", "xx", "xy"):
        run.add(text)
    assert [run.step(1)[0] for _ in range(7)] == [0, 2, 5, 3, 1, 6, 4]
    assert run.overtaken[1] == 3


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(steps=STEPS, extra=st.sampled_from([0.0, 0.5, 2.0, 6.0]))
def test_who_waited_longer_than_allowed_after_its_turn_goes_first(policy, steps, extra):
    run = Run(policy, Bounds(10**9, extra, 1e9))
    for texts, slots, _, seconds in steps:
        for text in texts:
            run.add(text)
        due = [arrival for arrival in sorted(run.waiting) if run.late(arrival) > extra]
        planned = run.step(slots)
        assert planned[: len(due)] == due[:slots]
        run.now += seconds


@pytest.mark.parametrize("policy", ["prefix", "k-lpm"])
@UNHURRIED
@given(steps=STEPS)
def test_eight_admissions_serve_the_oldest(policy, steps):
    run = Run(policy, LOOSE)
    count = 0
    for texts, slots, _, _ in steps:
        for text in texts:
            run.add(text)
        before = sorted(run.waiting)
        for arrival in run.step(slots):
            count = 0 if arrival == before[0] else count + 1
            before.remove(arrival)
            assert count < 8


def flood(policy, bounds, steps=1500):
    """One hot prefix, more of it than can be served, and cold ones between."""
    run = Run(policy, bounds)
    for number in range(20):
        run.add("hot" + chr(200 + number))
    cold = {}
    for step in range(steps):
        run.add("hot" + chr(200 + step % 500))
        if step % 40 == 5:
            rank = len(run.waiting)
            cold[run.add(chr(1000 + step) * 3)] = rank
        run.step(1)
        run.now += 1.0
    return run, cold


@pytest.mark.parametrize("extra", [30.0, 200.0])
def test_a_flood_of_one_prefix_does_not_hold_up_the_others(extra):
    run, cold = flood("prefix", Bounds(max_extra_wait=extra))
    served = [arrival for arrival in cold if arrival in run.waited]
    assert len(served) >= 0.7 * len(cold)
    for arrival in cold:
        assert run.passed[arrival] <= 8 * (cold[arrival] + 1)
    # A step after it is due at the latest, and one more for each that is due as well.
    assert max(run.extra[arrival] for arrival in served) <= extra + 8
    assert max(run.late(arrival) for arrival in run.waiting) <= extra + 8


def test_a_flood_starves_the_others_where_nothing_is_bounded():
    run, cold = flood("lpm", LOOSE)
    assert not cold.keys() & run.waited.keys()
    first = min(cold)
    assert run.passed[first] > 8 * (cold[first] + 1)


@pytest.mark.parametrize("policy", ORDERS)
def test_a_flood_starves_nobody_by_default_whatever_the_order(policy):
    run, cold = flood(policy, Bounds())
    due = [arrival for arrival in cold if run.late(arrival) > 60.0]
    assert len(due) > 10
    assert set(due) <= run.waited.keys()
