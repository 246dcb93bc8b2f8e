"""When whose turn came, first come, first served."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import FcfsTurns

UNHURRIED = settings(deadline=None)


@UNHURRIED
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 99))))
def test_turns_any_departures_equal_lists(steps):
    turns = FcfsTurns()
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


def test_since_turn_not_come_is_none():
    turns = FcfsTurns()
    assert turns.since(0) is None
    turns.depart(4.0, 2, 0)
    assert [turns.since(arrival) for arrival in range(3)] == [4.0, 4.0, None]


def test_overtaken_departures_of_older_ones_do_not_count():
    turns = FcfsTurns()
    turns.depart(0.0, 3, 0)
    # Of 0 to 4, 0 and 3 wait: 1, 2 and 4 have departed.
    assert turns.overtaken(0, older=0) == 3
    assert turns.overtaken(3, older=1) == 1


def test_depart_long_run_forgets_times_of_turns_taken():
    turns = FcfsTurns()
    for number in range(5000):
        turns.depart(float(number), 1, number + 1)
    assert len(turns._times) < 10
    assert turns.departed == 5000
    turns.depart(9999.0, 1, 4990)
    assert turns.since(5000) == 9999.0
