"""What operations cost, in nodes looked at and bytes kept: no stopwatch."""

import random
import tracemalloc

import pytest

from vllm_radix.tree import POLICIES, RadixTree, encode
from vllm_radix.tree.eviction import HitDensity

SIZE = 16


def resident(blocks, length, seed=0, policy="lru"):
    """A tree of idle prompts of ``length`` blocks each, none sharing a block."""
    rng = random.Random(seed)
    tree = RadixTree(SIZE, POLICIES[policy]())
    for first in range(0, blocks, length):
        ids = list(range(first, first + length))
        key = encode(rng.randrange(1 << 17) for _ in range(length * SIZE))
        tree.insert(key, ids)
        tree.note_end(ids, None, rng.choice((1, 99, 999)), rng.choice((1, 9999)))
        tree.release(ids[::-1])
    return tree


def test_a_tree_of_100k_blocks_keeps_120_bytes_a_block():
    """Keys included: 64 bytes a block are its tokens."""
    blocks, length = 100_096, 256
    ids = list(range(blocks))  # the pool has them anyway
    rng = random.Random(0)
    tracemalloc.start()
    try:
        tree = RadixTree(SIZE)
        for first in range(0, blocks, length):
            mine = ids[first : first + length]
            tree.insert(
                encode(rng.randrange(1 << 17) for _ in range(length * SIZE)), mine
            )
            tree.release(mine[::-1])
        del mine
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree.stats().cached_blocks == blocks
    print(f"{kept / blocks:.1f} bytes a block")
    assert kept / blocks <= 120


@pytest.mark.parametrize("fan_out", [10, 10_000])
def test_a_match_looks_at_the_nodes_of_its_path_only(fan_out):
    tree = RadixTree(SIZE)
    stem = list(range(10 * SIZE))
    tree.insert(encode(stem), list(range(10)))
    for i in range(fan_out):
        tree.insert(
            encode(stem + [1_000_000 + i] * SIZE), [*range(10), 10 + i], start=10
        )
    key = encode(stem + [1_000_000 + fan_out // 2] * SIZE)
    before, version, dump = tree.visited, tree.version, tree.dump()
    assert tree.match(key).num_blocks == 11
    assert tree.visited - before == 2
    near = encode(stem + [1_000_000 + fan_out // 2] * 5 + [7] * 11)
    assert tree.match(near, partial=True).partial[1:] == (5, SIZE)
    assert tree.visited - before <= 2 + 2 + 2
    assert (tree.version, tree.dump()) == (version, dump), "a match changes nothing"


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_looks_at_as_much_in_a_large_tree_as_in_a_small_one(policy):
    per_block = {}
    for blocks in (1_000, 20_000):
        tree = resident(blocks, 100, policy=policy)
        before = tree.visited
        assert len(tree.evict(500)) == 500
        per_block[blocks] = (tree.visited - before) / 500
    assert per_block[20_000] <= 1.3 * per_block[1_000]
    assert per_block[1_000] < 0.1, "a run of blocks is one look"


def test_a_long_request_that_fills_one_more_block_pays_for_that_block():
    tree = resident(2_000, 1_000)
    key = encode(range(5_000 * SIZE))
    ids = list(range(10_000, 15_000))
    tree.insert(key, ids[:4_000])
    before = tree.visited
    for count in range(4_001, 5_001):
        tree.insert(key, ids[:count], start=count - 1)
    assert tree.visited - before <= 1_000


def test_what_hit_density_knows_takes_11_bytes_a_block():
    """For runs of 64 blocks; evicted ones are remembered beside the cached."""
    kept = {}
    for policy in ("lru", "hit-density"):
        tracemalloc.start()
        try:
            tree = resident(20_032, 64, policy=policy)
            kept[policy], _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    evictor = tree._evictor
    # What does not grow with the cache, and what is not full yet, is counted apart.
    fixed = sum(
        len(made) * made.itemsize
        for made in (tree.policy.hits, tree.policy.ends, tree.policy.waiting)
    )
    fixed += 16 * len(evictor.account.distances)
    more = (kept["hit-density"] - kept["lru"] - fixed) / 20_032
    remembered = 48 * HitDensity.ghosts / 64
    print(
        f"{more:.1f} bytes a block, {remembered:.1f} for evicted ones; {fixed:,} fixed"
    )
    assert more + remembered <= 12


def test_the_walks_of_a_request_look_at_runs_not_at_blocks():
    tree = RadixTree(SIZE, HitDensity())
    told = []
    tree.policy.note_labelled = lambda label, blocks: told.append(blocks)
    ids = list(range(4_000))
    tree.insert(encode(range(4_000 * SIZE)), ids)
    tree.note_end(ids, None, 1, 1)
    assert told == [4_000]
