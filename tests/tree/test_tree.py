"""The prefix cache's contract, on the tree and on its oracle."""

import pytest

from tree.flat_cache import FlatCache
from vllm_radix.tree import RadixTree, encode

BLOCK = 2


def key(text: str) -> bytes:
    """One token a letter."""
    return encode([ord(letter) for letter in text])


@pytest.fixture(params=[RadixTree, FlatCache], ids=["tree", "flat"])
def cache(request):
    made = request.param(BLOCK)
    yield made
    made.check()


def test_match_is_the_longest_whole_block_prefix(cache):
    cache.insert(key("aabbcc"), [1, 2, 3])
    assert cache.match(key("aabbcc")).blocks == (1, 2, 3)
    assert cache.match(key("aabbxx")).blocks == (1, 2)
    assert cache.match(key("aabbcx")).blocks == (1, 2)
    assert cache.match(key("aabbc")).blocks == (1, 2)
    assert cache.match(key("a")).blocks == ()
    assert cache.match(key("xxbbcc")).blocks == ()
    assert cache.match(key("aabbcc"), limit=3).blocks == (1,)


def test_namespaces_never_share(cache):
    cache.insert(key("aabb"), [1, 2], namespace="one")
    assert cache.match(key("aabb"), "two").blocks == ()
    assert cache.match(key("aabb")).blocks == ()
    cache.insert(key("aabb"), [3, 4], namespace="two")
    assert cache.match(key("aabb"), "one").blocks == (1, 2)
    assert cache.match(key("aabb"), "two").blocks == (3, 4)


def test_a_split_keeps_both_branches(cache):
    cache.insert(key("aabbcc"), [1, 2, 3])
    cache.insert(key("aabbdd"), [1, 2, 4], start=2)
    cache.insert(key("aaee"), [1, 5], start=1)
    assert cache.match(key("aabbcc")).blocks == (1, 2, 3)
    assert cache.match(key("aabbdd")).blocks == (1, 2, 4)
    assert cache.match(key("aaee")).blocks == (1, 5)


def test_held_blocks_are_never_evicted(cache):
    cache.insert(key("aabb"), [1, 2])
    assert cache.evict(5) == []
    cache.release([2])
    assert cache.evict(5) == [2]
    assert cache.match(key("aabb")).blocks == (1,)


def test_eviction_is_least_recently_used_from_the_tail_block_by_block(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.insert(key("ccdd"), [3, 4])
    cache.release([2, 1])
    cache.release([4, 3])
    cache.acquire([1])
    cache.release([1])
    assert [cache.evict(1)[0] for _ in range(4)] == [2, 4, 3, 1]
    assert cache.evict(1) == []


def test_evict_takes_a_parent_after_its_children(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.insert(key("aacc"), [1, 3], start=1)
    cache.release([2, 1])  # 3 is still held, below 1
    assert cache.evict(9) == [2]
    cache.release([3])
    assert cache.evict(9) == [3, 1]


def test_release_of_a_block_puts_its_duplicate_in_its_place(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.insert(key("aabb"), [7, 8])
    assert cache.match(key("aabb")).blocks == (1, 2)
    assert cache.stats().duplicate_blocks == 2
    assert cache.release([2, 1]) == [2, 1]
    assert cache.match(key("aabb")).blocks == (7, 8)
    assert cache.release([8, 7]) == []
    assert cache.evict(9) == [8, 7]


def test_release_of_a_duplicate_uncaches_the_duplicate(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.insert(key("aabb"), [7, 8])
    assert cache.release([8, 7]) == [8, 7]
    assert 7 not in cache and 1 in cache


def test_insert_of_a_held_block_replaces_an_idle_duplicate(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.release([2, 1])
    assert sorted(cache.insert(key("aabb"), [7, 8])) == [1, 2]
    assert cache.match(key("aabb")).blocks == (7, 8)


def test_discard_hides_blocks_below_until_the_hole_is_filled(cache):
    cache.insert(key("aabbcc"), [1, 2, 3])
    assert cache.discard(2)
    assert not cache.discard(2)
    assert cache.match(key("aabbcc")).blocks == (1,)
    cache.insert(key("aabb"), [1, 9], start=1)
    assert cache.match(key("aabbcc")).blocks == (1, 9, 3)


def test_blocks_before_start_are_not_inserted(cache):
    cache.insert(key("aabbcc"), [1, 2, 3], start=2)
    assert cache.match(key("aabbcc")).blocks == ()
    assert 1 not in cache and 3 in cache
    cache.release([3])
    assert cache.evict(9) == [3]


def test_reset_forgets_everything(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.release([2])
    version = cache.version
    cache.reset()
    assert cache.version > version
    assert cache.match(key("aabb")).blocks == ()
    assert cache.stats().cached_blocks == 0
    cache.insert(key("aabb"), [1, 2])


def test_emptied_namespaces_are_dropped(cache):
    cache.insert(key("aa"), [1], namespace="salt")
    cache.release([1])
    cache.evict(1)
    assert cache.stats().namespaces == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((key("aa"), [1, 2]), "key holds 1 whole blocks"),
        ((key("aabb"), [4, -1]), "block ids are at least 0"),
        ((key("aa"), [3]), "block 3 is cached already"),
    ],
)
def test_bad_arguments_are_refused(cache, args, message):
    cache.insert(key("zz"), [3])
    with pytest.raises(ValueError, match=message):
        cache.insert(*args)


def test_block_size_is_checked():
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        RadixTree(0)


def test_dump_shows_edges_and_states():
    tree = RadixTree(BLOCK)
    tree.insert(key("aabb"), [1, 2])
    tree.insert(key("aacc"), [1, 3], start=1)
    tree.release([3])
    lines = tree.dump().splitlines()
    assert lines[0] == "namespace None"
    assert lines[1].startswith("  [97 97] blocks 1, held")
    assert "1 idle" in lines[3]
    assert RadixTree(1).dump() == "empty"


def test_check_reports_a_planted_fault_with_a_dump():
    tree = RadixTree(BLOCK)
    tree.insert(key("aabb"), [1, 2])
    tree._table.depths[2] = 7
    with pytest.raises(AssertionError, match="filed wrongly\nnamespace None"):
        tree.check()
    tree._table.depths[2] = 1


# -- probes and costs ----------------------------------------------------------


def test_probe_resumes_from_the_last_answer():
    tree = RadixTree(1)
    text = key("abcdefgh")
    assert tree.probe(text) is None
    tree.insert(text, list(range(4)))
    last = tree.probe(text)
    assert last.num_blocks == 4
    tree.insert(text, list(range(7)), start=4)
    tree.insert(key("abx"), [0, 1, 9], start=2)  # splits above the end
    last = tree.probe(text, last=last)
    assert last.num_blocks == 7
    tree.release([6, 5, 4, 3])
    tree.evict(3)
    last = tree.probe(text, last=last)
    assert last.num_blocks == 4
    tree.discard(1)
    assert tree.probe(text, last=last).num_blocks == 1


def test_matching_visits_one_node_an_edge_not_one_a_block():
    tree = RadixTree(1)
    long = key("x" * 1000)
    tree.insert(long, list(range(1000)))
    before = tree.visited
    assert tree.match(long).num_blocks == 1000
    assert tree.visited - before == 1


def test_a_resumed_probe_visits_a_constant_number_of_nodes():
    tree = RadixTree(1)
    text = "abcdefghijklmnop"
    tree.insert(key(text), list(range(len(text))))
    for cut in range(1, len(text)):  # a branch after each block: 15 edges deep
        path = [*range(cut), 100 + cut]
        tree.insert(key(text[:cut] + "X"), path, start=cut)
    last = tree.probe(key(text))
    before = tree.visited
    tree.probe(key(text), last=last)
    assert tree.visited - before <= 2


def test_a_growing_request_pays_for_its_new_block_alone():
    tree = RadixTree(1)
    tree.insert(key("a" * 29), list(range(29)))
    for cut in range(1, 29):  # a branch after each block: 29 edges deep
        tree.insert(key("a" * cut + "b"), [*range(cut), 100 + cut], start=cut)
    before = tree.visited
    tree.insert(key("a" * 30), list(range(30)), start=29)
    assert tree.visited - before <= 2


def test_evict_visits_one_heap_entry_per_run_at_any_size():
    visited = []
    for runs in (10, 1000):
        tree = RadixTree(1)
        for run in range(runs):
            ids = list(range(run * 50, run * 50 + 50))
            tree.insert(encode([run, *range(49)]), ids)
            tree.release(ids[::-1])
        before = tree.visited
        tree.evict(120)
        visited.append(tree.visited - before)
    assert visited[0] == visited[1] <= 6


def test_the_heap_stays_small_when_nothing_is_ever_evicted():
    tree = RadixTree(1)
    tree.insert(key("abc"), [0, 1, 2])
    for _ in range(10_000):
        tree.release([2, 1, 0])
        tree.acquire([0, 1, 2])
    assert len(tree._evictor.heap) <= 130


def test_probe_notices_other_tokens_in_the_same_leaf():
    tree = RadixTree(1)
    tree.insert(key("abcde"), [0, 1, 2, 3, 4])
    last = tree.probe(key("abcde"))
    assert last.num_blocks == 5
    tree.release([4, 3, 2, 1, 0])
    assert tree.evict(2) == [4, 3]
    tree.acquire([0, 1, 2])
    tree.insert(key("abcXY"), [0, 1, 2, 8, 9], start=3)  # grows the same node
    assert tree.probe(key("abcde"), last=last).num_blocks == 3
    assert tree.match(key("abcde")).num_blocks == 3


def test_below_lists_descendants_and_duplicates():
    tree = RadixTree(1)
    tree.insert(key("abc"), [0, 1, 2])
    tree.insert(key("abX"), [0, 1, 3], start=2)
    tree.insert(key("abc"), [5, 6, 7])
    assert sorted(tree.below(1)) == [2, 3, 6, 7]
    assert sorted(tree.below(6)) == [1, 2, 3, 7]
    assert tree.below(3) == []
    assert tree.below(99) == []


def test_discards_do_not_pile_up_in_the_heap():
    tree = RadixTree(1)
    tree.insert(encode(range(2000)), list(range(2000)))
    tree.release(range(1999, -1, -1))
    for block in range(1, 1900):
        tree.discard(block)
    assert len(tree._evictor.heap) <= 130
    tree.check()


def test_inserting_reads_only_the_new_ids():
    class Ids(list):
        read = 0

        def __getitem__(self, index):
            found = super().__getitem__(index)
            Ids.read += len(found) if isinstance(index, slice) else 1
            return found

    tree = RadixTree(1)
    tree.insert(key("a" * 1000), list(range(1000)))
    tree.insert(key("a" * 1001), Ids(range(1001)), start=1000)
    assert Ids.read <= 10


def test_a_match_may_end_inside_a_block(cache):
    cache.insert(key("aabbcc"), [1, 2, 3])
    assert cache.match(key("aabx")).blocks == (1,)
    assert cache.match(key("aabx"), partial=True).partial == (2, 1, 2)
    assert cache.match(key("aab"), partial=True).partial == (2, 1, 2)
    assert cache.match(key("ax"), partial=True) == ((), (1, 1, 2))
    assert cache.match(key("aabb"), limit=3, partial=True) == ((1,), (2, 1, 2))
    assert cache.match(key("xx"), partial=True) == ((), None)
    assert cache.match(key("aabx"), partial=True, written={2: 0}).partial is None


def test_partial_block_matches_only_its_own_tokens(cache):
    cache.insert(key("aa"), [1])
    assert cache.insert_partial(key("aab"), [1, 2]) == (True, [])
    assert cache.match(key("aabb"), partial=True) == ((1,), (2, 1, 1))
    assert cache.match(key("aabb")).blocks == (1,)
    assert cache.stats().partial_blocks == 1
    cache.check()
    cache.release([2, 1])
    assert cache.evict(2) == [2, 1], "the tail goes first"


def test_insert_turns_a_partial_block_into_a_full_one(cache):
    cache.insert(key("aa"), [1])
    cache.insert_partial(key("aab"), [1, 2])
    assert cache.insert(key("aabb"), [1, 2], start=1) == []
    assert cache.match(key("aabb")).blocks == (1, 2)
    assert cache.stats().partial_blocks == 0
    cache.check()


def test_partial_block_is_not_cached_beside_a_block_with_its_tokens(cache):
    cache.insert(key("aabb"), [1, 2])
    assert cache.insert_partial(key("aab"), [1, 3]) == (False, [])
    assert 3 not in cache
    cache.insert_partial(key("aac"), [1, 4])
    cache.release([4])
    assert cache.insert(key("aacc"), [1, 5], start=1) == [4], "it says no more"
    cache.check()


def test_insert_partial_needs_the_blocks_before_it(cache):
    cache.insert(key("aabb"), [1, 2])
    cache.discard(1)
    assert cache.insert_partial(key("aax"), [9, 3]) == (False, [])
    assert cache.insert_partial(key("xxy"), [9, 3]) == (False, [])
    cache.check()


def test_nothing_is_cached_below_a_partial_block(cache):
    """Accepted drafts may fill a block that was cached as partial, and one more."""
    cache.insert(key("aa"), [1])
    cache.insert_partial(key("aab"), [1, 2])
    assert cache.insert_partial(key("aabbc"), [1, 2, 3]) == (False, [])
    cache.insert(key("aabbcc"), [1, 2, 3], start=2)
    cache.check()
    assert cache.match(key("aabbcc")).blocks == (1,)


@pytest.mark.parametrize(
    ("tokens", "blocks", "message"),
    [
        ("aa", [1], "do not end inside the last of 1 blocks of 2"),
        ("aab", [1], "do not end inside the last of 1 blocks of 2"),
        ("aab", [1, 1], "block 1 is cached already"),
        ("aac", [1, 2], "block 2 is cached already, with other tokens"),
    ],
)
def test_bad_partial_blocks_are_refused(cache, tokens, blocks, message):
    cache.insert(key("aa"), [1])
    cache.insert_partial(key("aab"), [1, 2])
    with pytest.raises(ValueError, match=message):
        cache.insert_partial(key(tokens), blocks)
    cache.check()


def test_dump_shows_partial_blocks():
    tree = RadixTree(4)
    tree.insert_partial(encode([1, 2]), [7])
    assert tree.dump() == "namespace None\n  [1 2] blocks 7, held, 2 of 4 tokens"
