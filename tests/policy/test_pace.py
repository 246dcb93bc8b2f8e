"""The pace of admissions, the wait that it means, and whose turn came when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import Pace, Turns

UNHURRIED = settings(deadline=None)
STEP = 1000
"""Work of a step here; more than the least that one is worth."""


def run(pace, steps, each=STEP, admit=1, waiting=100, saved=0):
    """Schedule steps on end."""
    for _ in range(steps):
        pace.watch(waiting + admit, 0)
        pace.note(each, waiting, [saved] * admit)


def known():
    """A pace of a step for each, as nobody waits any more."""
    pace = Pace()
    run(pace, 100, waiting=1)
    let_pass(pace, STEP)
    assert pace.each == STEP
    return pace


def let_pass(pace, work):
    """Do work while nobody waits: the pace stays."""
    while work > 0:
        pace.note(min(work, STEP), 0, [])
        work -= STEP


def test_work_is_in_tokens_and_a_step_is_worth_some_at_least():
    pace = Pace()
    for tokens, work in ((5000, 5000), (0, 5000), (1, 5256), (256, 5512), (257, 5769)):
        pace.note(tokens, 0, [])
        assert pace.work == work


@pytest.mark.parametrize("each", [256, 1000, 30_000])
@pytest.mark.parametrize("admit", [1, 2, 4])
def test_a_steady_pace_is_learnt(each, admit):
    pace = Pace()
    run(pace, 100, each, admit)
    assert pace.each == pytest.approx(each / admit, rel=0.07)


@pytest.mark.parametrize("admit", [16, 32, 64])
def test_many_at_a_time_are_no_faster_than_they_are(admit):
    pace = Pace()
    run(pace, 100, STEP, admit)
    assert pace.each == pytest.approx(STEP / admit, rel=0.1)


def test_the_pace_follows_a_change():
    pace = known()
    run(pace, 70, 5 * STEP)
    assert pace.each == pytest.approx(5 * STEP, rel=0.07)


def test_few_admissions_are_no_pace():
    pace = Pace()
    run(pace, 24)
    assert not pace.known and pace.each == 256
    run(pace, 2)
    assert pace.known and pace.each == STEP


def test_steps_that_admit_nobody_slow_the_pace():
    pace = Pace()
    for _ in range(100):
        run(pace, 3, admit=0)
        run(pace, 1)
    assert pace.each == pytest.approx(4 * STEP, rel=0.07)


def test_work_while_nobody_waits_does_not_slow_the_pace():
    pace = Pace()
    for _ in range(20):
        run(pace, 9)
        run(pace, 1, waiting=0)
        let_pass(pace, 50 * STEP)
        pace.note(STEP, 100, [0])
    assert pace.each == pytest.approx(STEP, rel=0.07)


@pytest.mark.parametrize("waiting", [1, 50, 400])
def test_a_constant_queue_is_as_long_as_it_takes_to_serve(waiting):
    pace = known()
    for _ in range(3000):
        pace.watch(waiting, 0)
        let_pass(pace, STEP)
    assert pace.limit == waiting * STEP


def test_a_long_queue_is_remembered_for_three_times_its_wait():
    pace = known()
    pace.watch(100, 0)
    wait = pace.limit
    assert wait >= 100 * STEP
    let_pass(pace, int(2.99 * wait))
    pace.watch(10, 0)
    assert pace.limit == wait
    let_pass(pace, int(0.02 * wait))
    pace.watch(10, 0)
    assert pace.limit == 10 * STEP
    let_pass(pace, 31 * STEP)
    pace.watch(0, 0)
    assert pace.limit == 0.0


QUEUES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 200)), max_size=30)


@UNHURRIED
@given(QUEUES)
def test_growth_at_most_doubles_it(queues):
    pace = known()
    waits = [(pace.work, 2 * STEP)]
    for gap, waiting in queues:
        let_pass(pace, gap * STEP)
        pace.watch(waiting, 0)
        waits.append((pace.work, waiting * STEP))
        assert pace.limit >= waiting * STEP
        # As if each had been doubled, and so remembered for twice as long.
        recent = [2 * wait for then, wait in waits if then >= pace.work - 6 * wait]
        assert pace.limit <= max(recent)


@UNHURRIED
@given(QUEUES)
def test_of_a_falling_queue_the_longest_wait_is_remembered(queues):
    pace = known()
    for _ in range(3):
        pace.watch(300, 0)
        let_pass(pace, 2000 * STEP)
    pace.watch(300, 0)
    waits = [(pace.work, 300 * STEP)]
    falling = sorted((waiting for _, waiting in queues), reverse=True)
    for (gap, _), waiting in zip(queues, falling, strict=True):
        let_pass(pace, 5 * gap * STEP)
        pace.watch(waiting, 0)
        waits.append((pace.work, waiting * STEP))
        expected = max(wait for then, wait in waits if then >= pace.work - 3 * wait)
        assert pace.limit == expected


def test_a_growing_queue_is_expected_to_grow_on():
    pace = known()
    for waiting in range(200):
        pace.watch(waiting, 0)
        let_pass(pace, STEP)
    # One comes a step: it is twice as long when the last of them is served.
    assert pace.limit == pytest.approx(2 * 199 * STEP, rel=0.05)
    pace = known()
    for waiting in range(100):
        pace.watch(waiting, 0)
        let_pass(pace, 2 * STEP)
    assert pace.limit == pytest.approx(1.5 * 99 * STEP, rel=0.05)


def test_tokens_that_an_order_saved_are_added():
    pace = known()
    run(pace, 200, saved=50)
    run(pace, 200, saved=50, waiting=40)
    pace.watch(40, 0)
    assert pace.limit >= 40 * (pace.each + 50)
    pace._waits.clear()
    pace._queue.clear()
    pace.watch(40, 0)
    assert pace.limit == pytest.approx(40 * (pace.each + 50))
    run(pace, 64, saved=0, waiting=40)
    pace._waits.clear()
    pace._queue.clear()
    pace.watch(40, 0)
    assert pace.limit == pytest.approx(40 * pace.each)


def test_what_is_watched_does_not_pile_up():
    pace = Pace()
    for _ in range(5000):
        pace.watch(1, 0)
        pace.note(STEP, 0, [0])
    assert len(pace._queue) < 1000


def test_what_is_watched_is_dropped_once_there_is_a_pace():
    pace = known()
    for step in range(5000):
        pace.watch(step % 20, 0)
        let_pass(pace, STEP)
    assert len(pace._queue) < 100
    assert len(pace._waits) < 100


@UNHURRIED
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 99))))
def test_turns_come_with_departures(steps):
    turns = Turns()
    waiting, departed, times, arrived = [], [], [], 0
    for now, (come, go, number) in enumerate(steps):
        waiting += range(arrived, arrived + come)
        arrived += come
        going = [
            waiting.pop(number % len(waiting)) for _ in range(min(go, len(waiting)))
        ]
        departed += going
        times += [float(now)] * len(going)
        if going:
            turns.depart(float(now), len(going), waiting[0] if waiting else arrived)
        assert turns.departed == len(departed)
        for older, arrival in enumerate(waiting):
            came = times[arrival] if arrival < len(times) else None
            assert turns.since(arrival) == came
            before = sum(other > arrival for other in departed)
            assert turns.overtaken(arrival, older) == before
        kept = len(departed) - min(waiting, default=arrived)
        assert len(turns._times) <= 2 * max(0, kept) + 1
