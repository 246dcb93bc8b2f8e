"""Deficit counters: nobody gets more than a quantum ahead."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import DeficitCounters

UNHURRIED = settings(deadline=None)
LARGEST = 60


@pytest.mark.parametrize("quantum", [10, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_over_quota_ten_times_as_much_sent_gets_no_more_while_both_wait(quantum, seed):
    rng = random.Random(seed)
    deficits = DeficitCounters(quantum)
    waiting = {"heavy": 0, "light": 0}
    served = {"heavy": 0, "light": 0}
    both = widest = 0
    for step in range(20_000):
        waiting["heavy"] += 1
        waiting["light"] += step % 10 == 0 or step < 50
        present = [tenant for tenant, count in waiting.items() if count]
        free = [t for t in present if t not in deficits.over_quota(present)]
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
            deficits = DeficitCounters(quantum)
    assert both > 100
    assert widest >= min(quantum, LARGEST) / 2


@UNHURRIED
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, LARGEST)), max_size=80),
)
def test_over_quota_all_wait_all_the_time_stay_within_a_quantum(quantum, charges):
    tenants = ["a", "b", "c", "d"]
    deficits = DeficitCounters(quantum)
    served = dict.fromkeys(tenants, 0)
    for number, tokens in charges:
        free = sorted(set(tenants) - deficits.over_quota(tenants))
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
def test_over_quota_any_charges_are_never_all_and_only_those_who_wait(quantum, rounds):
    deficits = DeficitCounters(quantum)
    for waiting, tokens in rounds:
        over = deficits.over_quota(waiting)
        assert over <= waiting
        assert over != waiting or not waiting
        for tenant in waiting - over:
            deficits.charge(tenant, tokens)


def test_over_quota_lone_tenant_is_never():
    deficits = DeficitCounters(10)
    for tokens in (1, 5, 10, 11, 1000, 7):
        assert deficits.over_quota(["me"]) == set()
        deficits.charge("me", tokens)


def test_over_quota_tenant_stands_back_until_others_have_used_theirs():
    deficits = DeficitCounters(10)
    assert deficits.over_quota("ab") == set()
    deficits.charge("a", 9)
    assert deficits.over_quota("ab") == set()
    deficits.charge("a", 1)
    assert deficits.over_quota("ab") == {"a"}
    deficits.charge("b", 25)
    assert deficits.over_quota("ab") == {"b"}, "a new round: 10 against -5"
    assert deficits.over_quota("b") == set(), "nobody else waits"


def test_over_quota_unused_quantum_is_not_saved_up():
    deficits = DeficitCounters(10)
    deficits.over_quota("ab")
    for _ in range(20):
        deficits.charge("a", 10)
        deficits.over_quota("a")
    deficits.charge("b", 10)
    assert deficits.over_quota("ab") == {"b"}


def test_charge_gone_tenants_are_forgotten_when_they_owe_nothing():
    deficits = DeficitCounters(10)
    for name in range(100):
        deficits.over_quota([str(name)])
        deficits.charge(str(name), 5)
    deficits.charge("debtor", 35)
    for _ in range(2):
        deficits.charge("here", 10)
        deficits.over_quota(["here"])
    assert set(deficits._left) == {"debtor"}
    for _ in range(4):
        deficits.charge("here", 10)
        deficits.over_quota(["here"])
    assert not deficits._left


def test_charge_tenants_of_one_request_each_do_not_pile_up():
    deficits = DeficitCounters(1000)
    deficits.charge("first", 2000)
    for name in range(9_000):
        deficits.charge(str(name), 5)
    assert deficits.over_quota(["first", "new"]) == {"first"}
    for name in range(9_000, 12_000):
        deficits.over_quota([str(name)])
        deficits.charge(str(name), 5)
    assert len(deficits._left) <= 10_000
    assert deficits.over_quota(["first", "new"]) == set(), "forgiven"
