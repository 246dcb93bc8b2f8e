"""Eviction policies: the contract for each of them, and the registry."""

from hashlib import sha256

import pytest

from tree.eviction_contract import BLOCK, EvictionContract
from tree.requests import evicted_by_mixed_operations
from vllm_radix.tree import LRU, POLICIES, RadixTree, encode
from vllm_radix.tree.eviction import Queues, register

LRU_ORDERS = "da63dabab301bb6b", "8463e636fc50da11", "0b15bfb45009c549"
"""Of seeds: what commit 5d6c74d evicted, which asked the policy for a rank."""


class TestLRU(EvictionContract):
    name = "lru"

    @pytest.mark.parametrize(("seed", "evicted"), list(enumerate(LRU_ORDERS)))
    def test_the_order_is_that_of_before_there_were_classes(self, seed, evicted):
        order = evicted_by_mixed_operations(RadixTree(BLOCK), seed)
        assert sha256(repr(order).encode()).hexdigest()[:16] == evicted

    def test_the_block_idle_for_longest_goes_first(self, tree):
        tree.insert(encode(range(4)), [0, 1])
        tree.insert(encode(range(10, 14)), [2, 3])
        tree.release([1, 0])
        tree.release([3, 2])
        tree.acquire([0, 1])
        tree.release([1, 0])  # used again: younger than the other prompt
        assert tree.evict(9) == [3, 2, 1, 0]


class TestHitDensity(EvictionContract):
    name = "hit-density"


class TestSegmentedLRU(EvictionContract):
    name = "slru"

    def test_probation_goes_first_while_little_is_protected(self, policy):
        queues = Queues(2)
        queues.ranks, queues.blocks = [9, 5], [3, 12]
        assert policy.pick(queues) == 0
        queues.blocks = [3, 13]
        assert policy.pick(queues) == 1


class TestS3FIFO(EvictionContract):
    name = "s3-fifo"

    def test_newcomers_go_first_while_they_are_more_than_a_tenth(self, policy):
        queues = Queues(2)
        queues.ranks, queues.blocks = [9, 5], [2, 9]
        assert policy.pick(queues) == 0
        queues.blocks = [1, 9]
        assert policy.pick(queues) == 1


class TestARC(EvictionContract):
    name = "arc"

    def test_what_comes_back_gets_more_room(self, policy):
        queues = Queues(2)
        queues.ranks, queues.blocks = [9, 5], [10, 10]
        assert policy.pick(queues) == 0
        policy.note_evicted(0, 12)
        policy.note_reused(0, 1, 10, True)
        assert policy.pick(queues) == 1
        policy.note_evicted(1, 1)
        policy.note_reused(1, 1, 1, True)
        assert policy.pick(queues) == 0


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


def test_a_policy_with_too_many_classes_is_refused():
    class Policy(LRU):
        name = "crowded"
        num_classes = 300

    with pytest.raises(ValueError, match="has 300 classes; allowed: 1 to 254"):
        register(Policy)


def test_a_policy_that_picks_an_empty_class_is_told_so():
    class Policy(LRU):
        name = "wrong"
        num_classes = 3

        def pick(self, queues):
            return 2

    tree = RadixTree(1, Policy())
    tree.insert(encode([1]), [0])
    tree.release([0])
    with pytest.raises(ValueError, match="'wrong' picked class 2, which has no block"):
        tree.evict(1)
