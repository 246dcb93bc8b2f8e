"""Deficit counters: nobody gets more than a quantum ahead."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import Deficits

UNHURRIED = settings(deadline=None)
LARGEST = 60


@pytest.mark.parametrize("quantum", [10, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_who_sends_ten_times_as_much_gets_no_more_while_both_wait(quantum, seed):
    rng = random.Random(seed)
    deficits = Deficits(quantum)
    waiting = {"heavy": 0, "light": 0}
    served = {"heavy": 0, "light": 0}
    both = widest = 0
    for step in range(20_000):
        waiting["heavy"] += 1
        waiting["light"] += step % 10 == 0 or step < 50
        present = [tenant for tenant, count in waiting.items() if count]
        free = [t for t in present if t not in deficits.barred(present)]
        # As greedy an order as can be: the heavy one whenever it is allowed.
        tenant = "heavy" if "heavy" in free else free[0]
        tokens = rng.randint(1, LARGEST)
        deficits.charge(tenant, tokens)
        waiting[tenant] -= 1
        if len(present) == 2:
            both += 1
            served[tenant] += tokens
            ahead = served["heavy"] - served["light"]
            widest = max(widest, abs(ahead))
            assert abs(ahead) < quantum + LARGEST
        else:
            served = dict.fromkeys(served, 0)
            deficits = Deficits(quantum)
    assert both > 100
    assert widest >= min(quantum, LARGEST) / 2


@UNHURRIED
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, LARGEST)), max_size=80),
)
def test_all_who_wait_all_the_time_stay_within_a_quantum(quantum, charges):
    tenants = ["a", "b", "c", "d"]
    deficits = Deficits(quantum)
    served = dict.fromkeys(tenants, 0)
    for number, tokens in charges:
        free = sorted(set(tenants) - deficits.barred(tenants))
        tenant = free[number % len(free)]
        deficits.charge(tenant, tokens)
        served[tenant] += tokens
        assert max(served.values()) - min(served.values()) < quantum + LARGEST


@UNHURRIED
@given(
    st.integers(1, 40),
    st.lists(
        st.tuples(st.sets(st.sampled_from("abcde")), st.integers(0, 200)), max_size=60
    ),
)
def test_never_all_are_barred_and_only_those_who_wait(quantum, rounds):
    deficits = Deficits(quantum)
    for waiting, tokens in rounds:
        barred = deficits.barred(waiting)
        assert barred <= waiting
        assert barred != waiting or not waiting
        for tenant in waiting - barred:
            deficits.charge(tenant, tokens)


def test_a_lone_tenant_is_never_barred():
    deficits = Deficits(10)
    for tokens in (1, 5, 10, 11, 1000, 7):
        assert deficits.barred(["me"]) == set()
        deficits.charge("me", tokens)


def test_a_tenant_stands_back_until_the_others_have_used_theirs():
    deficits = Deficits(10)
    assert deficits.barred("ab") == set()
    deficits.charge("a", 9)
    assert deficits.barred("ab") == set()
    deficits.charge("a", 1)
    assert deficits.barred("ab") == {"a"}
    deficits.charge("b", 25)
    assert deficits.barred("ab") == {"b"}, "a new round: 10 against -5"
    assert deficits.barred("b") == set(), "nobody else waits"


def test_what_is_not_used_is_not_saved_up():
    deficits = Deficits(10)
    deficits.barred("ab")
    for _ in range(20):
        deficits.charge("a", 10)
        deficits.barred("a")
    deficits.charge("b", 10)
    assert deficits.barred("ab") == {"b"}


def test_gone_tenants_are_forgotten_when_they_owe_nothing():
    deficits = Deficits(10)
    for name in range(100):
        deficits.barred([str(name)])
        deficits.charge(str(name), 5)
    deficits.charge("debtor", 35)
    for _ in range(2):
        deficits.charge("here", 10)
        deficits.barred(["here"])
    assert set(deficits._left) == {"debtor"}
    for _ in range(4):
        deficits.charge("here", 10)
        deficits.barred(["here"])
    assert not deficits._left


def test_tenants_of_one_request_each_do_not_pile_up():
    deficits = Deficits(1000)
    deficits.charge("first", 2000)
    for name in range(9_000):
        deficits.charge(str(name), 5)
    assert deficits.barred(["first", "new"]) == {"first"}
    for name in range(9_000, 12_000):
        deficits.barred([str(name)])
        deficits.charge(str(name), 5)
    assert len(deficits._left) <= 10_000
    assert deficits.barred(["first", "new"]) == set(), "forgiven"
