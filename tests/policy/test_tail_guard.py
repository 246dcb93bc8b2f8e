"""The tail guard, against serving everybody by age in a list."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import ArrivalTable, TailGuard

UNHURRIED = settings(deadline=None, max_examples=100)
AGES = st.lists(st.integers(0, 12), min_size=1, max_size=9)
EACH, WORK = 4.0, 100


def filled(ages, gone=()):
    """A table of requests as old as that, in units of one admission's work."""
    table = ArrivalTable()
    for arrival, age in enumerate(sorted(ages, reverse=True)):
        table.add(arrival, WORK - int(EACH) * age, 0)
    for arrival in gone:
        table.remove(arrival)
    return table


def too_late(ages, gone, unavailable, planned, chosen, limit):
    """Whether one older than ``chosen`` waits too long when that goes next.

    All others are served by age after those planned and ``chosen``.
    """
    old = sorted(ages, reverse=True)
    done = [arrival for arrival in planned if arrival not in unavailable]
    rest = [
        arrival
        for arrival in range(len(old))
        if arrival not in {*gone, *unavailable, *planned, chosen}
    ]
    return any(
        old[arrival] + len(done) + 1 + position > limit
        for position, arrival in enumerate(rest)
        if arrival < chosen
    )


def guard(ages, limit, gone=(), unavailable=(), planned=()):
    table = filled(ages, gone)
    return TailGuard(table, unavailable, planned, WORK, EACH, EACH * limit)


def draw_sets(data, count):
    subset = st.sets(st.integers(0, count - 1))
    gone, unavailable = data.draw(subset), data.draw(subset)
    return gone, unavailable - gone


@UNHURRIED
@given(AGES, st.integers(0, 20), st.data())
def test_allows_any_step_agrees_with_serving_all_by_age(ages, limit, data):
    count = len(ages)
    gone, unavailable = draw_sets(data, count)
    there = [a for a in range(count) if a not in gone | unavailable]
    planned = there[: data.draw(st.integers(0, count))]
    made = guard(ages, limit, gone, unavailable, planned)
    left = there[len(planned) :]
    while left:
        for arrival in left:
            late = too_late(ages, gone, unavailable, planned, arrival, limit)
            assert made.allows(arrival) == (not late)
        goes = data.draw(st.sampled_from(left))
        made.note_planned(goes)
        left.remove(goes)
        planned = [*planned, goes]


@UNHURRIED
@given(AGES, st.integers(0, 20), st.data())
def test_note_planned_oldest_takes_slack_from_nobody(ages, limit, data):
    gone, unavailable = draw_sets(data, len(ages))
    there = [a for a in range(len(ages)) if a not in gone | unavailable]
    made = guard(ages, limit, gone, unavailable)
    slack = made._slack.copy()
    for arrival in there:
        made.note_planned(arrival)
        assert (made._slack[arrival + 1 :] == slack[arrival + 1 :]).all()


@UNHURRIED
@given(AGES, st.data())
def test_allows_nobody_watched_before_it_is_always_true(ages, data):
    gone, unavailable = draw_sets(data, len(ages))
    made = guard(ages, 0, gone, unavailable)
    there = [a for a in range(len(ages)) if a not in gone | unavailable]
    assert all(made.allows(arrival) for arrival in there[:1])


def test_allows_until_slack_is_used_up():
    # The oldest is 2 admissions old: 3 may pass it.
    made = guard([2, 0, 0, 0, 0, 0], limit=5)
    for arrival in (1, 2, 3):
        assert made.allows(arrival)
        made.note_planned(arrival)
    assert not made.allows(4)
    made.note_planned(0)
    assert made.allows(4)


def test_allows_unavailable_too_late_already_is_not_watched():
    assert not guard([9, 0], limit=5).allows(1)
    assert guard([9, 0], limit=5, unavailable=[0]).allows(1)


def test_allows_after_rows_before_the_first_have_gone():
    table = filled([0] * 1000, gone=range(980))
    for arrival in range(1000, 1100):
        table.add(arrival, WORK, 0)
    assert table.first > 0
    made = TailGuard(table, [], [], WORK, EACH, EACH * 50)
    # It is the 50th, 980 being the first, that can wait for one more, or not.
    assert made.allows(1030)
    assert not made.allows(1031)


def test_allows_younger_one_planned_before_has_taken_slack():
    # The oldest can wait for one, and 1 has passed it.
    assert too_late([0, 0, 0], (), (), [1], 2, 1)
    assert not guard([0, 0, 0], limit=1, planned=[1]).allows(2)
