"""Does the double catch bugs? Each one here is planted, and must be caught.

A mutant is caught by a wrong read wherever it can lead to one, with all checks of
pool and tree off, so that the proof rests on the worker alone. Of some the tree
itself refuses what follows from them, before anything wrong is read.
"""

import pytest

from support.engine_double import WrongReadError
from support.traffic import traffic
from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.tree import HOLE, RadixTree, radix_tree
from vllm_radix.tree.shape import Shape

SEEDS = range(12)
MUTANTS = {}


def mutant(caught_by=WrongReadError):
    def note(plant):
        MUTANTS[plant.__name__] = plant, caught_by
        return plant

    return note


@mutant()
def a_block_is_copied_in_the_step_that_writes_it(patch):
    match = RadixTree.match
    patch.setattr(
        RadixTree,
        "match",
        lambda self, *a, written=None, **options: match(self, *a, **options),
    )


@mutant()
def salts_are_ignored(patch):
    patch.setattr(RequestKeys, "namespace", lambda self, request: None)


@mutant(caught_by=(WrongReadError, ValueError, RuntimeError))
def an_evicted_block_stays_in_the_tree(patch):
    def evict(self, count):
        idle = [b for b in range(len(self._table.nodes)) if self.is_idle(b)]
        return idle[:count]

    patch.setattr(RadixTree, "evict", evict)


@mutant()
def a_parent_is_evicted_and_its_child_takes_its_place(patch):
    evict = RadixTree.evict

    def wrong(self, count):
        out = evict(self, count)
        for node in self._shape.nodes():
            if len(node.blocks) > 2 and HOLE not in node.blocks[:2]:
                node.blocks[0], node.blocks[1] = node.blocks[1], node.blocks[0]
                break
        return out

    patch.setattr(RadixTree, "evict", wrong)


@mutant(caught_by=(WrongReadError, ValueError))
def a_tombstone_still_names_its_block(patch):
    def discard(self, block):
        return block in self

    patch.setattr(RadixTree, "discard", discard)


@mutant()
def a_split_is_off_by_one(patch):
    split = Shape.split

    def wrong(self, node, at):
        upper = split(self, node, at)
        upper.blocks[-1], node.blocks[0] = node.blocks[0], upper.blocks[-1]
        return upper

    patch.setattr(Shape, "split", wrong)


@mutant()
def a_merge_joins_the_wrong_way_round(patch):
    merge = Shape.merge

    def wrong(self, node, child):
        seam = slice(len(node.blocks) - 1, len(node.blocks) + 1)
        merge(self, node, child)
        upper, lower = node.blocks[seam]
        node.blocks[seam] = lower, upper
        depths = self._table.depths
        depths[upper], depths[lower] = depths[lower], depths[upper]

    patch.setattr(Shape, "merge", wrong)


@mutant()
def a_partial_hit_is_one_token_too_long(patch):
    match = RadixTree.match

    def wrong(self, key, namespace=None, limit=None, **options):
        found = match(self, key, namespace, limit, **options)
        part = found.partial
        if part and part.num_tokens + 1 < self.block_size:
            part = part._replace(num_tokens=part.num_tokens + 1)
        return found._replace(partial=part)

    patch.setattr(RadixTree, "match", wrong)


@mutant()
def a_tail_is_published_with_a_token_nobody_computed(patch):
    publish = RadixBlockPool.cache_partial

    def wrong(self, request, blocks):
        computed = request.num_computed_tokens
        request.num_computed_tokens = request.num_tokens
        publish(self, request, blocks)
        request.num_computed_tokens = computed

    patch.setattr(RadixBlockPool, "cache_partial", wrong)


@mutant()
def a_block_in_use_is_taken_over(patch):
    def wrong(self, request, match, blocks):
        source = self.block_pool.blocks[match.partial.block]
        self._group.taken = source
        return source

    patch.setattr(RadixKVCacheManager, "_partial_hit", wrong)


@mutant(caught_by=(WrongReadError, ValueError))
def a_duplicate_does_not_take_over(patch):
    def wrong(self, block):
        for duplicate in self._table.duplicates.pop(block):
            del self._table.duplicate_of[duplicate]

    patch.setattr(RadixTree, "_replace_by_duplicate", wrong)


@mutant(caught_by=(WrongReadError, ValueError))
def a_reset_forgets_the_tree(patch):
    patch.setattr(RadixTree, "reset", lambda self: None)


@mutant()
def a_hit_ends_in_the_wrong_block(patch):
    find = radix_tree.find_partial

    def wrong(node, *args):
        found, looked = find(node, *args)
        if found and node.blocks and node.blocks[0] != HOLE:
            found = found._replace(block=node.blocks[0])
        return found, looked

    patch.setattr(radix_tree, "find_partial", wrong)


@mutant(caught_by=AssertionError)
def held_blocks_may_be_evicted(patch):
    patch.setattr(RadixTree, "acquire", lambda self, blocks: None)


@mutant(caught_by=AssertionError)
def blocks_that_nobody_uses_stay_held(patch):
    patch.setattr(RadixBlockPool, "_release", lambda self, blocks: None)


def first_failure(check):
    """Run the traffic until something is caught; return what, or None."""
    for seed in SEEDS:
        try:
            traffic(seed, check=check)
        except Exception as error:
            return error
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, monkeypatch):
    plant, caught_by = MUTANTS[name]
    plant(monkeypatch)
    error = first_failure(check=caught_by is AssertionError)
    assert error is not None, "nobody noticed"
    assert isinstance(error, caught_by), repr(error)


def test_without_a_bug_nothing_is_caught():
    assert first_failure(check=True) is None
    assert first_failure(check=False) is None
