"""What every eviction policy must keep; each registered one runs through this.

A test class per policy derives from ``EvictionContract``, names the policy, and adds
what is particular to it; see ``test_eviction.py``.
"""

import random

import pytest

from tree.flat_cache import FlatCache
from vllm_radix.tree import POLICIES, EvictionPolicy, RadixTree, encode
from vllm_radix.tree.eviction import RANK_LIMIT

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

    @pytest.mark.parametrize("clock", [0, 1, 10**6, 1 << 60])
    @pytest.mark.parametrize("depth", [0, 1, 10**5])
    def test_ranks_are_whole_numbers_below_the_limit(self, policy, clock, depth):
        rank = policy.rank(clock, depth)
        assert type(rank) is int
        assert 0 <= rank < RANK_LIMIT

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

    def test_partial_blocks_that_were_never_hit_go_first(self, tree):
        tree.insert(encode([1, 1]), [0])
        tree.insert(encode([5, 5]), [1])
        tree.insert_partial(encode([1, 1, 2]), [0, 2])
        tree.release([1])
        tree.release([2, 0])
        assert tree.evict(1) == [2]

    @pytest.mark.parametrize("seed", range(5))
    def test_each_evicted_block_has_the_lowest_rank_of_all_that_may_go(self, seed):
        rng = random.Random(seed)
        tree, flat = (
            made(BLOCK, POLICIES[self.name]()) for made in (RadixTree, FlatCache)
        )
        held, evicted = [], 0
        for first in range(0, 120, 3):
            key = encode([rng.randrange(3) for _ in range(3 * BLOCK)])
            ids = [first, first + 1, first + 2]
            assert tree.insert(key, ids) == flat.insert(key, ids)
            held.append(ids)
            if rng.random() < 0.7:
                ids = held.pop(rng.randrange(len(held)))
                assert tree.release(ids[::-1]) == flat.release(ids[::-1])
            if rng.random() < 0.4:
                for block in tree.evict(rng.randrange(1, 6)):
                    ranks = flat.evictable_ranks()
                    assert ranks[block] == min(ranks.values())
                    flat.discard(block)
                    evicted += 1
            tree.check()
        assert evicted > 10
