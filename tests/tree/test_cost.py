"""What operations cost, in nodes looked at and bytes kept: no stopwatch."""

import random
import sys
import tracemalloc

import pytest

from vllm_radix.tree import POLICIES, RadixTree, encode
from vllm_radix.tree.eviction import HitDensity
from vllm_radix.tree.stack_distance import StackDistances

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


class Counted(list):
    """A list that counts how often it is asked for an item."""

    looks = 0

    def __getitem__(self, index):
        self.looks += 1
        return super().__getitem__(index)


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


def test_what_hit_density_knows_takes_9_bytes_a_block():
    """For runs of 64 blocks; evicted ones are remembered beside the cached."""
    few, many = 2_048, 10_240
    kept = {}
    HitDensity()  # what is imported is no one's
    for policy in ("lru", "hit-density"):
        for blocks in (few, many):
            tracemalloc.start()
            try:
                tree = resident(blocks, 64, policy=policy)
                kept[policy, blocks], _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert tree.num_cached == blocks
    more = {n: kept["hit-density", n] - kept["lru", n] for n in (few, many)}
    each = (more[many] - more[few]) / (many - few)
    fixed = more[few] - few * each
    # As large as the ring of the evicted ones ever is for them.
    remembered = 48 * HitDensity.ghosts / 64
    print(f"{each:.1f} bytes a block, {remembered} if evicted; {fixed:,.0f} fixed")
    assert each + remembered <= 9
    assert fixed < 200_000


def calls(run):
    """Return the Python functions that are called, and how often altogether."""
    names = []

    def note(frame, event, _):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(names), names


def path_of_edges(edges, policy):
    """A tree, and a cached prompt of so many edges of ten blocks, and its blocks."""
    tree, key, blocks = RadixTree(SIZE, policy), b"", []
    for number in range(edges):
        first = 20 * number
        key += encode(range(first * SIZE, (first + 10) * SIZE))
        blocks += range(first, first + 10)
        tree.insert(key, blocks, start=len(blocks) - 10)
        branch = key + encode([10**6 + number] * SIZE)
        tree.insert(branch, [*blocks, first + 10], start=len(blocks))
    return tree, key, blocks


def test_a_run_more_is_no_call_more_for_the_walks_of_a_request():
    counts = {}
    for edges in (2, 40):
        tree, key, blocks = path_of_edges(edges, HitDensity())
        told = []
        tree.policy.note_labelled = lambda label, count, told=told: told.append(count)
        for _ in range(3):
            use = tree.note_use(key, None, blocks[-1], len(blocks))
            tree.note_end(blocks, use, 1, 0)
        assert told == [10 * edges] * 3, "blocks of one class are told of at once"
        begins, _ = calls(
            lambda: tree.note_use(key, None, blocks[-1], len(blocks))  # noqa: B023
        )
        ends, _ = calls(lambda: tree.note_end(blocks, use, 1, 0))  # noqa: B023
        counts[edges] = begins, ends
    print(f"calls of the walks: {counts[2]}")
    assert counts[2] == counts[40]
    assert sum(counts[2]) <= 50


def test_an_evicted_run_costs_hit_density_25_calls_more():
    counts = {}
    for policy in ("lru", "hit-density"):
        tree = resident(6_400, 16, policy=policy)
        tree.evict(160)
        counts[policy], _ = calls(lambda: tree.evict(160 * 16))  # noqa: B023
    more = (counts["hit-density"] - counts["lru"]) / 160
    print(f"{counts['lru'] / 160:.1f} calls a run, {more:.1f} more for hit-density")
    assert more <= 25


@pytest.mark.parametrize("times", [1_000, 40_000])
def test_the_end_of_the_compared_cache_moves_no_further_than_it_has_to(times):
    distances = StackDistances()
    distances.capacity = 2 * times
    for clock in range(times):
        distances.add(clock, 5)
    distances.horizon()
    slots = distances._slots = Counted(distances._slots)
    for clock in range(times, times + 50):
        distances.add(clock, 5)
        distances.horizon()
    # Two look-ups for each time that it passes, and one for each that is added.
    assert slots.looks <= 50 * 6
