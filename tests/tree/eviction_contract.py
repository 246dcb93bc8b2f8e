"""What every eviction policy must keep; each registered one runs through this.

A test class per policy derives from ``EvictionContract``, names the policy, and adds
what is particular to it; see ``test_eviction.py``. ``test_machine.py`` drives each of
them with random operations beside an oracle.
"""

import random

import pytest

from tree.requests import Requests
from vllm_radix.tree import POLICIES, EvictionPolicy, RadixTree, encode
from vllm_radix.tree.eviction import MAX_CLASSES, NEVER, Queues

BLOCK = 2


class EvictionContract:
    """The contract; ``name`` is what the option ``eviction`` calls the policy."""

    name: str

    @pytest.fixture
    def policy(self):
        return POLICIES[self.name]()

    @pytest.fixture
    def tree(self, policy):
        tree = RadixTree(BLOCK, policy)
        yield tree
        tree.check()

    def test_it_is_registered_under_its_own_name(self, policy):
        assert isinstance(policy, EvictionPolicy)
        assert policy.name == self.name
        assert 1 <= policy.num_classes <= MAX_CLASSES

    @pytest.mark.parametrize("uses", [1, 2, 3, 17, 255])
    @pytest.mark.parametrize("output_tokens", [0, 10**7])
    @pytest.mark.parametrize("new_tokens", [0, 10**7])
    def test_labels_are_classes(self, policy, uses, output_tokens, new_tokens):
        label = policy.label(uses, output_tokens, new_tokens)
        assert type(label) is int
        assert 0 <= label < policy.num_classes

    def test_the_only_class_with_blocks_is_picked(self, policy):
        for label in range(policy.num_classes):
            queues = Queues(policy.num_classes)
            queues.now, queues.ranks[label], queues.blocks[label] = 9 + label, 5, 1
            queues.open, queues.changed = {label}, set(range(policy.num_classes))
            assert policy.pick(queues) == label
            assert queues.ranks[label] != NEVER

    def test_held_blocks_are_never_evicted(self, tree):
        tree.insert(encode(range(4)), [0, 1])
        tree.insert(encode([9, 9, 8, 8]), [2, 3])
        tree.release([3, 2])
        assert sorted(tree.evict(9)) == [2, 3]
        assert 0 in tree and 1 in tree

    def test_a_block_is_evicted_after_all_below_it(self, tree):
        tree.insert(encode([1, 1, 2, 2]), [0, 1])
        tree.insert(encode([1, 1, 3, 3]), [0, 2], start=1)
        # Released the wrong way round, the parent first.
        tree.release([0, 1, 2])
        evicted = tree.evict(9)
        assert sorted(evicted) == [0, 1, 2]
        assert evicted[-1] == 0

    @pytest.mark.parametrize("count", range(7))
    def test_no_more_blocks_go_than_are_asked_for(self, tree, count):
        tree.insert(encode(range(6)), [0, 1, 2])
        tree.insert(encode(range(10, 16)), [3, 4, 5])
        tree.release([2, 1, 0])
        tree.release([5, 4, 3])
        assert len(tree.evict(count)) == count
        assert tree.num_idle == 6 - count

    def test_pinned_blocks_go_last(self, tree):
        tree.insert(encode(range(4)), [0, 1])
        tree.insert(encode(range(10, 14)), [2, 3])
        tree.insert(encode(range(20, 24)), [4, 5])
        for ids in ([1, 0], [3, 2], [5, 4]):
            tree.release(ids)
        tree.pin(3)
        evicted = tree.evict(9)
        assert sorted(evicted) == [0, 1, 2, 3, 4, 5]
        assert set(evicted[-2:]) == {2, 3}

    def test_a_pinned_block_above_others_of_its_run_stays(self, tree):
        tree.insert(encode(range(6)), [0, 1, 2])
        tree.insert(encode(range(10, 14)), [3, 4])
        tree.note_end([0, 1, 2], None, 0, 0)
        tree.release([2, 1, 0])
        tree.release([4, 3])
        tree.pin(1)
        evicted = tree.evict(9)
        assert sorted(evicted[:3]) == [2, 3, 4]
        assert evicted[3:] == [1, 0]

    def test_partial_blocks_that_were_never_hit_go_first(self, tree):
        tree.insert(encode([1, 1]), [0])
        tree.insert(encode([5, 5]), [1])
        tree.insert_partial(encode([1, 1, 2]), [0, 2])
        tree.release([1])
        tree.release([2, 0])
        assert tree.evict(1) == [2]

    def test_blocks_whose_end_is_not_noted_leave_in_order_of_release(self, tree):
        for first in (0, 2, 4):
            tree.insert(encode(range(10 * first, 10 * first + 4)), [first, first + 1])
        tree.release([3, 2])
        tree.release([5, 4])
        tree.release([1, 0])
        assert tree.evict(6) == [3, 2, 5, 4, 1, 0]

    @pytest.mark.parametrize("seed", range(5))
    def test_within_a_class_blocks_leave_in_order_of_release(self, policy, seed):
        requests = Requests(RadixTree(BLOCK, policy), 60, seed)
        for _ in range(300):
            requests.step()
        requests.tree.check()
        assert len(requests.evicted) > 100

    @pytest.mark.parametrize("seed", range(3))
    def test_the_same_requests_give_the_same_order(self, seed):
        first, second = (
            Requests(RadixTree(BLOCK, POLICIES[self.name]()), 60, seed)
            for _ in range(2)
        )
        for _ in range(300):
            first.step()
            second.step()
        assert first.evicted == second.evicted

    def test_a_reset_forgets_what_was_learned(self):
        policy = POLICIES[self.name]()
        tree = RadixTree(BLOCK, policy)
        before = Requests(tree, 60, seed=1)
        for _ in range(300):
            before.step()
        before.end_all()
        tree.reset()
        after = Requests(tree, 60, seed=2)
        fresh = Requests(RadixTree(BLOCK, POLICIES[self.name]()), 60, seed=2)
        for _ in range(200):
            after.step()
            fresh.step()
        assert after.evicted == fresh.evicted

    def test_what_is_remembered_of_evicted_blocks_is_bounded(self, policy):
        tree = RadixTree(BLOCK, policy)
        rng = random.Random(3)
        for number in range(400):
            tokens = [number, *(rng.randrange(1000) for _ in range(4 * BLOCK - 1))]
            ids = list(range(4 * number, 4 * number + 4))
            blank = ids if number < 5 else tree.evict(4)
            tree.insert(encode(tokens), blank)
            tree.note_end(blank, None, 0, 4 * BLOCK)
            tree.release(blank[::-1])
        assert tree.num_remembered <= policy.ghosts * 20
        if policy.ghosts:
            assert tree.num_remembered >= policy.ghosts * 20 - 4
