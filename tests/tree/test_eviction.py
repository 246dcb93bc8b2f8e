"""Eviction policies: the contract for each of them, and the registry."""

import pytest

from tree.eviction_contract import EvictionContract
from vllm_radix.tree import LRU, POLICIES, RadixTree, encode
from vllm_radix.tree.eviction import register


class TestLRU(EvictionContract):
    name = "lru"

    def test_the_block_idle_for_longest_goes_first(self, tree):
        tree.insert(encode(range(4)), [0, 1])
        tree.insert(encode(range(10, 14)), [2, 3])
        tree.release([1, 0])
        tree.release([3, 2])
        tree.acquire([0, 1])
        tree.release([1, 0])  # used again: younger than the other prompt
        assert tree.evict(9) == [3, 2, 1, 0]


def test_every_registered_policy_runs_through_the_contract():
    """A new policy needs a class above."""
    covered = {case.name for case in EvictionContract.__subclasses__()}
    assert covered == set(POLICIES)


def test_the_default_policy_is_lru():
    assert isinstance(RadixTree(1).policy, LRU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "Policy needs a name"),
        ("lru", "two eviction policies are called 'lru'"),
    ],
)
def test_a_policy_without_a_name_of_its_own_is_refused(name, message):
    class Policy(LRU):
        pass

    Policy.name = name
    before = dict(POLICIES)
    with pytest.raises(ValueError, match=message):
        register(Policy)
    assert before == POLICIES
