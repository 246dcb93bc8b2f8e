"""Whole runs: requests come, are planned and admitted; how long does each wait?"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import LOOSE, SmallQueue, nodes, planner

from vllm_radix.policy import ORDERS, OvertakingBounds, StepCapacity

UNHURRIED = settings(deadline=None, max_examples=18)
AMPLE = 10**6


class Run:
    """A queue before a cache that holds the texts of the last few admitted.

    Attributes:
        overtaken: by arrival: later ones that departed first.
        waited: by arrival: seconds from arrival to departure.
        extra: by arrival: seconds from its turn to departure.
        passed: by arrival: admissions while it waited.
    """

    def __init__(self, policy, bounds, each=0.0):
        self.planner = planner(policy, bounds, 10**6)
        self.queue = SmallQueue()
        self.queue.rate.work_per_admission = each
        self.now = 0.0
        self.departed, self.times = [], []
        self.overtaken, self.waited, self.extra, self.passed = {}, {}, {}, {}

    @property
    def waiting(self):
        return self.queue.entries

    def add(self, text):
        arrival = self.queue.add(text, self.now, int(self.now)).arrival
        self.overtaken[arrival] = self.passed[arrival] = 0
        return arrival

    def step(self, slots, blocks=AMPLE, blocked=()):
        """Plan and admit, as vLLM does: in order, as long as it fits.

        Args:
            slots: requests that may be admitted.
            blocks: that are free beside what is cached.
            blocked: arrivals that cannot go.

        Returns:
            The arrivals planned, and how many of them were admitted.
        """
        queue = self.queue
        queue.look_up()
        queue.rate.work = int(self.now)
        free = blocks + len(queue.idle())
        capacity = StepCapacity(slots, 10**6, free)
        picks = queue.plan(self.planner, capacity, self.now, blocked)
        planned = [pick.entry for pick in picks]
        assert len({entry.arrival for entry in planned}) == len(planned) <= slots
        admitted, held = 0, set()
        for entry in planned:
            assert entry.arrival in self.waiting and entry.arrival not in blocked
            path = nodes(queue.texts[entry.arrival])
            free -= len(path - held) + 1
            if free < 0:
                break
            held |= path
            self._admit(entry, blocked)
            admitted += 1
        if admitted:
            oldest = min(self.waiting, default=len(queue.texts))
            queue.turns.depart(self.now, admitted, oldest)
        for entry in planned[:admitted]:
            self.extra[entry.arrival] = self.late(entry.arrival)
        return [entry.arrival for entry in planned], admitted

    def late(self, arrival):
        """Seconds since a request's turn came."""
        return self.now - self.times[arrival] if arrival < len(self.times) else 0.0

    def _admit(self, entry, blocked):
        oldest = min(arrival for arrival in self.waiting if arrival not in blocked)
        self.planner.note_admitted(entry.arrival == oldest)
        self.queue.remove(entry.arrival)
        for other in self.waiting:
            self.overtaken[other] += other < entry.arrival
            self.passed[other] += 1
        self.departed.append(entry.arrival)
        self.times.append(self.now)
        self.waited[entry.arrival] = self.now - entry.arrived_at
        self.queue.warm = [*self.queue.warm[-3:], self.queue.texts[entry.arrival]]


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
def test_run_max_overtakes_nobody_is_overtaken_more_often(policy, steps, most, tight):
    run = Run(policy, OvertakingBounds(most, 1e9, 1e9))
    for texts, slots, blocks, _ in steps:
        for text in texts:
            run.add(text)
        run.step(slots, blocks if tight else AMPLE)
        assert max(run.overtaken.values(), default=0) <= most
        for arrival in run.waiting:
            older = run.queue.table.num_older(arrival)
            turns = run.queue.turns
            assert turns.overtaken(arrival, older) == run.overtaken[arrival]


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(steps=STEPS, most=st.integers(1, 4), stride=st.integers(2, 4))
def test_run_max_overtakes_holds_for_all_but_the_blocked(policy, steps, most, stride):
    run = Run(policy, OvertakingBounds(most, 1e9, 1e9))
    for texts, slots, _, _ in steps:
        for text in texts:
            run.add(text)
        run.step(slots, blocked=[a for a in run.waiting if a % stride == 0])
        for arrival, count in run.overtaken.items():
            assert count <= most or arrival % stride == 0


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(steps=STEPS, tight=st.booleans())
def test_run_any_order_nobody_is_lost_and_nobody_goes_twice(policy, steps, tight):
    run = Run(policy, OvertakingBounds())
    for texts, slots, blocks, seconds in steps:
        for text in texts:
            run.add(text)
        run.step(slots, blocks if tight else AMPLE)
        run.now += seconds
    for _ in range(len(run.waiting)):
        planned, admitted = run.step(1, 4)
        assert planned and admitted, "there is always room for one"
    assert sorted(run.departed) == list(range(len(run.queue.texts)))
    run.queue.tree.check()


def test_run_max_overtakes_is_used_up():
    run = Run("lpm", OvertakingBounds(3, 1e9, 1e9))
    for text in ("xx", "a", "xx", "xy", "xz", "xx", "xy"):
        run.add(text)
    assert [run.step(1)[0][0] for _ in range(7)] == [0, 2, 5, 3, 1, 6, 4]
    assert run.overtaken[1] == 3


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(steps=STEPS, extra=st.sampled_from([0.0, 0.5, 2.0, 6.0]), tight=st.booleans())
def test_run_max_extra_wait_who_is_late_goes_first(policy, steps, extra, tight):
    run = Run(policy, OvertakingBounds(10**9, extra, 1e9))
    for texts, slots, blocks, seconds in steps:
        for text in texts:
            run.add(text)
        due = [arrival for arrival in sorted(run.waiting) if run.late(arrival) > extra]
        planned, _ = run.step(slots, blocks if tight else AMPLE)
        count = min(len(due), len(planned))
        assert planned[:count] == due[:count]
        run.now += seconds


@UNHURRIED
@given(STEPS)
def test_run_k_lpm_eight_admissions_serve_the_oldest(steps):
    run = Run("k-lpm", LOOSE)
    count = 0
    for texts, slots, _, _ in steps:
        for text in texts:
            run.add(text)
        before = sorted(run.waiting)
        for arrival in run.step(slots)[0]:
            count = 0 if arrival == before[0] else count + 1
            before.remove(arrival)
            assert count < 8


@UNHURRIED
@given(STEPS, st.integers(1, 4))
def test_run_window_overtakes_no_more_than_wait_in_it(steps, width):
    run = Run("window", LOOSE)
    run.planner.order.width = width
    for texts, slots, _, _ in steps:
        for text in texts:
            run.add(text)
        left = sorted(run.waiting)
        for arrival in run.step(slots)[0]:
            assert left.index(arrival) < width
            left.remove(arrival)


def flood(policy, bounds, steps=600, blocks=AMPLE):
    """One hot prefix, more of it than can be served, and cold ones between."""
    run = Run(policy, bounds, each=1.0)
    run.queue.warm = ["hot" + chr(number) for number in range(196, 200)]
    for number in range(20):
        run.add("hot" + chr(200 + number))
    cold = {}
    for step in range(steps):
        run.add("hot" + chr(200 + step % 500))
        if step % 40 == 5:
            rank = len(run.waiting)
            cold[run.add(chr(1000 + step) * 4)] = rank
        run.step(1, blocks)
        run.now += 1.0
    return run, cold


@pytest.mark.parametrize("policy", ["prefix", "lpm"])
@pytest.mark.parametrize("extra", [30.0, 200.0])
def test_flood_max_extra_wait_bounds_who_is_cold(policy, extra):
    # A cold one takes 5 blocks, and 4 are free beside the hot prefix.
    run, cold = flood(policy, OvertakingBounds(10**9, extra, 1e9), blocks=0)
    served = [arrival for arrival in cold if arrival in run.waited]
    assert len(served) >= (0.7 if extra < 100 else 0.5) * len(cold)
    # A step after it is due at the latest, and one more for each that is due as well.
    assert max(run.extra[arrival] for arrival in served) <= extra + 8
    assert max(run.late(arrival) for arrival in run.waiting) <= extra + 8


def test_flood_room_beside_the_hot_prefix_is_served_in_order_of_arrival():
    run, cold = flood("prefix", LOOSE)
    assert run.departed == sorted(run.departed)
    assert cold


def test_flood_k_lpm_every_eighth_bounds_who_is_cold():
    run, cold = flood("k-lpm", LOOSE)
    for arrival in cold:
        assert run.passed[arrival] <= 8 * (cold[arrival] + 1)


def test_flood_nothing_bounded_starves_who_is_cold():
    run, cold = flood("lpm", LOOSE)
    assert not cold.keys() & run.waited.keys()
    first = min(cold)
    assert run.passed[first] > 8 * (cold[first] + 1)


@pytest.mark.parametrize("policy", ORDERS)
def test_flood_default_bounds_starve_nobody_whatever_the_order(policy):
    run, cold = flood(policy, OvertakingBounds(), blocks=0)
    due = [arrival for arrival in cold if run.late(arrival) > 60.0]
    assert len(due) > 5
    assert set(due) <= run.waited.keys()
