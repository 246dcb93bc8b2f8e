"""The bounds on a plan: how far, and how long, an order may put requests back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import (
    FREE,
    LOOSE,
    SmallQueue,
    common,
    most_common,
    plan,
    planner,
)

from vllm_radix.policy import ORDERS, FcfsTurns, OvertakingBounds, StepCapacity
from vllm_radix.policy.orders import LongestPrefix

UNHURRIED = settings(deadline=None, max_examples=100)
TEXTS = st.lists(st.text("xyz", max_size=4), max_size=9)
WARM = st.lists(st.text("xyz", max_size=4), max_size=3)
ARRIVALS = st.sets(st.integers(0, 8))


class Guarded(LongestPrefix):
    """The tail guard, and no other bound."""

    uses_tail_guard = True


@pytest.mark.parametrize("policy", ORDERS)
@settings(UNHURRIED, max_examples=20)
@given(texts=TEXTS, warm=WARM)
def test_plan_no_overtakes_allowed_goes_in_order_of_arrival(policy, texts, warm):
    queue = SmallQueue(texts, warm)
    arrivals, reasons = plan(policy, queue, bounds=OvertakingBounds(0, 1e9, 1e9))
    assert arrivals == list(range(len(texts)))
    assert set(reasons) <= {"turn"}


@UNHURRIED
@given(TEXTS, WARM, st.floats(0, 99), st.integers(0, 20))
def test_plan_no_patience_default_goes_in_order_of_arrival(texts, warm, limit, blocks):
    queue = SmallQueue(texts, warm)
    queue.rate.wait_limit, queue.rate.work_per_admission = limit, 0.1
    bounds = OvertakingBounds(10**9, 1e9, 0.0)
    arrivals, reasons = plan("prefix", queue, StepCapacity(9, 99, blocks), bounds)
    assert arrivals == list(range(len(arrivals)))
    assert set(reasons) <= {"turn", "guard"}


class Departures:
    """A queue of which some have departed, and what the order would do."""

    def __init__(self, texts, warm, gone, blocked):
        self.queue = SmallQueue(texts, warm)
        self.texts, self.known = texts, list(warm)
        there = range(len(texts))
        self.departed = [arrival for arrival in there if arrival in gone]
        for arrival in self.departed:
            self.queue.remove(arrival)
        oldest = min(self.queue.entries, default=len(texts))
        if self.departed:
            self.queue.turns.depart(0.0, len(self.departed), oldest)
        self.blocked = [a for a in self.queue.entries if a in blocked]
        self.left = [a for a in self.queue.entries if a not in blocked]

    def best(self):
        def cached(arrival):
            return most_common(self.texts[arrival], self.known)

        return min(self.left, key=lambda arrival: (-cached(arrival), arrival))

    def overtaken(self, arrival):
        return sum(other > arrival for other in self.departed)

    def goes(self, arrival):
        self.left.remove(arrival)
        self.departed.append(arrival)
        self.known.append(self.texts[arrival])


@UNHURRIED
@given(TEXTS, WARM, ARRIVALS, ARRIVALS, st.integers(1, 5))
def test_plan_max_overtakes_first_pick_is_exact(texts, warm, gone, blocked, most):
    made = Departures(texts, warm, gone, blocked)
    bounds = OvertakingBounds(most, 1e9, 1e9)
    capacity = StepCapacity(1, 99, 999)
    found = plan("lpm", made.queue, capacity, bounds, unavailable=made.blocked)
    if not made.left:
        assert found == ([], [])
        return
    best, oldest = made.best(), made.left[0]
    if best != oldest and made.overtaken(oldest) >= most:
        assert found == ([oldest], ["overtakes"])
    else:
        assert found[0] == [best]


@pytest.mark.parametrize("policy", ORDERS)
@settings(UNHURRIED, max_examples=30)
@given(
    texts=TEXTS,
    warm=WARM,
    gone=ARRIVALS,
    blocked=ARRIVALS,
    most=st.integers(1, 5),
    blocks=st.integers(0, 30),
)
def test_plan_max_overtakes_whole_plan_is_a_hard_bound(
    policy, texts, warm, gone, blocked, most, blocks
):
    made = Departures(texts, warm, gone, blocked)
    before = {arrival: made.overtaken(arrival) for arrival in made.left}
    bounds = OvertakingBounds(most, 1e9, 1e9)
    capacity = StepCapacity(9, 999, blocks)
    found, _ = plan(policy, made.queue, capacity, bounds, unavailable=made.blocked)
    for arrival in found:
        made.goes(arrival)
        for other in made.left:
            assert made.overtaken(other) <= max(most, before[other])


@UNHURRIED
@given(TEXTS, WARM, ARRIVALS, ARRIVALS, st.integers(1, 5))
def test_plan_max_overtakes_whole_plan_is_exact(texts, warm, gone, blocked, most):
    made = Departures(texts, warm, gone, blocked)
    bounds = OvertakingBounds(most, 1e9, 1e9)
    found, _ = plan("lpm", made.queue, FREE, bounds, unavailable=made.blocked)
    for arrival in found:
        best, oldest = made.best(), made.left[0]
        late = made.overtaken(oldest) >= most
        assert arrival == (oldest if late else best)
        made.goes(arrival)


def test_plan_max_overtakes_older_planned_ones_are_no_overtakes():
    # The first is warm and goes in turn; nobody has overtaken the second yet.
    queue = SmallQueue(["xx", "a", "x"], ["xx"])
    assert plan("lpm", queue, bounds=OvertakingBounds(1, 1e9, 1e9))[0] == [0, 2, 1]


def test_plan_max_overtakes_blocked_older_one_counts_unless_it_computes():
    # Either 0 departed, or one that overtook 0 and 1.
    for computes, expected in ((True, [2, 1]), (False, [1, 2])):
        queue = SmallQueue(["a", "b", "x"], ["x"])
        queue.turns.depart(0.0, 1, 0)
        if computes:
            queue.remove(0)
        out = [] if computes else [0]
        bounds = OvertakingBounds(1, 1e9, 1e9)
        assert plan("lpm", queue, bounds=bounds, unavailable=out)[0] == expected


@pytest.mark.parametrize("policy", [name for name in ORDERS if name != "fcfs"])
def test_plan_oldest_at_its_bound_goes_first(policy):
    # It does not fit beside what is needed, and is the longest.
    queue = SmallQueue(["abcdefgh", "xy", "xz", "x"], ["x"], ages=[1, 1, 1, 1])
    queue.turns = FcfsTurns()
    queue.turns.depart(-5.0, 1, 0)
    capacity = StepCapacity(3, 10_000, 9)
    found = plan(policy, queue, capacity, OvertakingBounds(1, 1e9, 1e9))
    assert (found[0][0], found[1][0]) == (0, "overtakes")
    found = plan(policy, queue, capacity, OvertakingBounds(9, 4.9, 1e9))
    assert (found[0][0], found[1][0]) == (0, "wait")
    found = plan(policy, queue, capacity, OvertakingBounds(9, 5.0, 1e9))
    assert found[0][0] != 0


def test_plan_turn_not_come_is_not_late():
    queue = SmallQueue(["aaa", "x"], ["x"])
    bounds = OvertakingBounds(10**9, 0.0, 1e9)
    assert plan("lpm", queue, bounds=bounds, now=1e6)[0] == [1, 0]


@pytest.mark.parametrize("before", [0, 3, 7, 20])
def test_plan_k_lpm_every_eighth_is_the_oldest(before):
    queue = SmallQueue(["a", "b", *["x"] * 30], ["x"])
    arrivals, reasons = plan("k-lpm", queue, overtaking=before)
    first = max(0, 7 - before)
    assert arrivals.index(0) == first
    assert arrivals.index(1) == first + 8
    assert reasons.count("every") == 2
    assert "every" not in plan("lpm", queue, overtaking=before)[1]
    assert "every" not in plan("prefix", queue, overtaking=before)[1]


def test_note_admitted_counts_what_a_plan_alone_does_not():
    made, queue = planner("k-lpm"), SmallQueue(["a", "x"], ["x"])
    capacity = StepCapacity(1, 99, 99)

    def first():
        return [pick.entry.arrival for pick in queue.plan(made, capacity)]

    for _ in range(9):
        assert first() == [1]
    for _ in range(7):
        made.note_admitted(oldest=False)
    assert first() == [0]
    made.note_admitted(oldest=True)
    assert made.overtaking == 0


def test_plan_guard_keeps_each_within_the_limit():
    bounds = OvertakingBounds(10**9, 1e9, 1.0)
    for limit, first in ((1.0, 1), (0.9, 0)):
        queue = SmallQueue(["a", "x"], ["x"])
        queue.rate.work_per_admission, queue.rate.wait_limit = 1.0, limit
        arrivals, reasons = plan(Guarded(), queue, bounds=bounds)
        assert arrivals[0] == first
        assert reasons[0] == ("prefix" if first else "guard")


@UNHURRIED
@given(
    st.lists(st.tuples(st.text("xy", max_size=3), st.integers(0, 20)), max_size=8),
    WARM,
    st.integers(1, 4),
    st.integers(0, 40),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_plan_guard_lets_pass_while_all_can_wait(made, warm, each, limit, patience):
    made.sort(key=lambda request: -request[1])
    texts, ages = [text for text, _ in made], [age for _, age in made]
    queue = SmallQueue(texts, warm, ages=ages)
    queue.rate.work_per_admission = float(each)
    queue.rate.wait_limit = float(limit)
    bounds = OvertakingBounds(10**9, 1e9, patience)
    arrivals, reasons = plan(Guarded(), queue, bounds=bounds)
    left, known = list(range(len(texts))), list(warm)

    def late(chosen):
        """Whether one older than it waits too long, all by age after it."""
        done = len(texts) - len(left)
        rest = [arrival for arrival in left if arrival != chosen]
        return any(
            ages[older] + (done + rank + 1) * each > limit * patience
            for rank, older in enumerate(rest)
            if older < chosen
        )

    for arrival, reason in zip(arrivals, reasons, strict=True):
        cached = {
            at: max((common(texts[at], other) for other in known), default=0)
            for at in left
        }
        wanted = min(left, key=lambda at: (-cached[at], at))
        assert arrival == (left[0] if late(wanted) else wanted)
        assert (reason == "guard") == (wanted != left[0] and late(wanted))
        left.remove(arrival)
        known.append(texts[arrival])


def test_plan_loose_bounds_hold_nobody_back():
    queue = SmallQueue(["a", "b", "x"], ["x"])
    assert plan("lpm", queue, bounds=LOOSE)[0] == [2, 0, 1]
