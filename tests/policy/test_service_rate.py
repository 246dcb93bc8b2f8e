"""The rate of admissions, and the wait that it means for a newcomer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import ServiceRate

UNHURRIED = settings(deadline=None)
STEP = 1000
"""Work of a step here; more than the least that one is worth."""


def run(rate, steps, each=STEP, admit=1, waiting=100, saved=0):
    """Schedule steps on end."""
    for _ in range(steps):
        rate.observe_queue(waiting + admit, 0)
        rate.observe_step(each, waiting, [saved] * admit)


def known():
    """A rate of a step for each, as nobody waits any more."""
    rate = ServiceRate()
    run(rate, 100, waiting=1)
    let_pass(rate, STEP)
    assert rate.work_per_admission == STEP
    return rate


def let_pass(rate, work):
    """Do work while nobody waits: the rate stays."""
    while work > 0:
        rate.observe_step(min(work, STEP), 0, [])
        work -= STEP


def test_work_small_step_is_worth_some_at_least():
    rate = ServiceRate()
    for tokens, work in ((5000, 5000), (0, 5000), (1, 5256), (256, 5512), (257, 5769)):
        rate.observe_step(tokens, 0, [])
        assert rate.work == work


@pytest.mark.parametrize("each", [256, 1000, 30_000])
@pytest.mark.parametrize("admit", [1, 2, 4])
def test_observe_step_steady_rate_is_learnt(each, admit):
    rate = ServiceRate()
    run(rate, 100, each, admit)
    assert rate.work_per_admission == pytest.approx(each / admit, rel=0.07)


@pytest.mark.parametrize("admit", [16, 32, 64])
def test_observe_step_many_at_a_time_are_no_faster_than_they_are(admit):
    rate = ServiceRate()
    run(rate, 100, STEP, admit)
    assert rate.work_per_admission == pytest.approx(STEP / admit, rel=0.1)


def test_observe_step_changed_rate_is_followed():
    rate = known()
    run(rate, 70, 5 * STEP)
    assert rate.work_per_admission == pytest.approx(5 * STEP, rel=0.07)


def test_known_few_admissions_is_false():
    rate = ServiceRate()
    run(rate, 24)
    assert not rate.known and rate.work_per_admission == 256
    run(rate, 2)
    assert rate.known and rate.work_per_admission == STEP


def test_observe_step_nobody_admitted_slows_the_rate():
    rate = ServiceRate()
    for _ in range(100):
        run(rate, 3, admit=0)
        run(rate, 1)
    assert rate.work_per_admission == pytest.approx(4 * STEP, rel=0.07)


def test_observe_step_nobody_waits_does_not_slow_the_rate():
    rate = ServiceRate()
    for _ in range(20):
        run(rate, 9)
        run(rate, 1, waiting=0)
        let_pass(rate, 50 * STEP)
        rate.observe_step(STEP, 100, [0])
    assert rate.work_per_admission == pytest.approx(STEP, rel=0.07)


@pytest.mark.parametrize("waiting", [1, 50, 400])
def test_wait_limit_constant_queue_is_the_time_to_serve_it(waiting):
    rate = known()
    for _ in range(3000):
        rate.observe_queue(waiting, 0)
        let_pass(rate, STEP)
    assert rate.wait_limit == waiting * STEP


def test_wait_limit_long_queue_is_remembered_for_three_times_its_wait():
    rate = known()
    rate.observe_queue(100, 0)
    wait = rate.wait_limit
    assert wait >= 100 * STEP
    let_pass(rate, int(2.99 * wait))
    rate.observe_queue(10, 0)
    assert rate.wait_limit == wait
    let_pass(rate, int(0.02 * wait))
    rate.observe_queue(10, 0)
    assert rate.wait_limit == 10 * STEP
    let_pass(rate, 31 * STEP)
    rate.observe_queue(0, 0)
    assert rate.wait_limit == 0.0


QUEUES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 200)), max_size=30)


@UNHURRIED
@given(QUEUES)
def test_wait_limit_growing_queue_is_doubled_at_most(queues):
    rate = known()
    waits = [(rate.work, 2 * STEP)]
    for gap, waiting in queues:
        let_pass(rate, gap * STEP)
        rate.observe_queue(waiting, 0)
        waits.append((rate.work, waiting * STEP))
        assert rate.wait_limit >= waiting * STEP
        # As if each had been doubled, and so remembered for twice as long.
        recent = [2 * wait for then, wait in waits if then >= rate.work - 6 * wait]
        assert rate.wait_limit <= max(recent)


@UNHURRIED
@given(QUEUES)
def test_wait_limit_falling_queue_is_the_longest_remembered(queues):
    rate = known()
    for _ in range(3):
        rate.observe_queue(300, 0)
        let_pass(rate, 2000 * STEP)
    rate.observe_queue(300, 0)
    waits = [(rate.work, 300 * STEP)]
    falling = sorted((waiting for _, waiting in queues), reverse=True)
    for (gap, _), waiting in zip(queues, falling, strict=True):
        let_pass(rate, 5 * gap * STEP)
        rate.observe_queue(waiting, 0)
        waits.append((rate.work, waiting * STEP))
        expected = max(wait for then, wait in waits if then >= rate.work - 3 * wait)
        assert rate.wait_limit == expected


def test_wait_limit_growing_queue_is_expected_to_grow_on():
    rate = known()
    for waiting in range(200):
        rate.observe_queue(waiting, 0)
        let_pass(rate, STEP)
    # One comes a step: it is twice as long when the last of them is served.
    assert rate.wait_limit == pytest.approx(2 * 199 * STEP, rel=0.05)
    rate = known()
    for waiting in range(100):
        rate.observe_queue(waiting, 0)
        let_pass(rate, 2 * STEP)
    assert rate.wait_limit == pytest.approx(1.5 * 99 * STEP, rel=0.05)


def test_wait_limit_saved_tokens_are_added():
    rate = known()
    run(rate, 200, saved=50)
    run(rate, 200, saved=50, waiting=40)
    rate.observe_queue(40, 0)
    assert rate.wait_limit >= 40 * (rate.work_per_admission + 50)
    rate._waits.clear()
    rate._queue.clear()
    rate.observe_queue(40, 0)
    assert rate.wait_limit == pytest.approx(40 * (rate.work_per_admission + 50))
    run(rate, 64, saved=0, waiting=40)
    rate._waits.clear()
    rate._queue.clear()
    rate.observe_queue(40, 0)
    assert rate.wait_limit == pytest.approx(40 * rate.work_per_admission)


def test_observe_queue_unknown_rate_does_not_pile_up():
    rate = ServiceRate()
    for _ in range(5000):
        rate.observe_queue(1, 0)
        rate.observe_step(STEP, 0, [0])
    assert len(rate._queue) < 1000


def test_observe_queue_known_rate_drops_what_is_old():
    rate = known()
    for step in range(5000):
        rate.observe_queue(step % 20, 0)
        let_pass(rate, STEP)
    assert len(rate._queue) < 100
    assert len(rate._waits) < 100


def limit_with(follow_ups, saved, steps=60):
    """Return the limit after a queue has grown by follow-ups, and others' arrivals."""
    rate = ServiceRate()
    waiting = 100
    for _ in range(steps):
        rate.observe_queue(waiting, 0)
        rate.observe_step(1000, waiting, [saved] * 2)
        waiting += 2
        rate.num_follow_ups += follow_ups
    rate.observe_queue(waiting, 0)
    return rate.wait_limit


def test_observe_queue_follow_ups_that_savings_caused_do_not_raise_the_limit():
    # Each admission costs 500 and saves as much: half of the answers are too early.
    by_themselves = limit_with(0, saved=500)
    assert limit_with(2, saved=500) == by_themselves  # As many as are admitted.
    grown = limit_with(4, saved=500)
    assert grown < by_themselves
    # Of 220 that wait, half of 120 would not be there; growth falls likewise.
    assert 0.4 < grown / by_themselves < 0.75


def test_observe_queue_follow_ups_without_savings_change_nothing():
    assert limit_with(4, saved=0) == limit_with(0, saved=0)


def test_observe_queue_admissions_without_work_are_no_error():
    rate = ServiceRate()
    rate.observe_step(0, 5, [])
    for _ in range(30):
        rate.observe_step(0, 5, [0])
    rate.observe_queue(5, 0)
    assert rate.wait_limit == 0
