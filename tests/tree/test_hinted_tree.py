"""What somebody says of blocks: what goes first, what stays, and what is left alone."""

import pytest

from vllm_radix.tree import POLICIES, RadixTree, encode

BLOCK = 2


@pytest.fixture(params=POLICIES)
def tree(request):
    tree = RadixTree(BLOCK, POLICIES[request.param]())
    yield tree
    tree.check()


def path(tree, name, blocks, ids, start=0):
    """Cache a path: the symbols of a name, a block each."""
    key = encode([ord(symbol) for symbol in name for _ in range(BLOCK)])
    assert len(name) == blocks
    tree.insert(key, ids, start=start)
    return key


def test_what_an_ended_session_used_alone_goes_first(tree):
    path(tree, "sab", 3, [0, 1, 2])
    path(tree, "sxy", 3, [0, 3, 4], start=1)
    tree.release([2, 1])
    tree.release([4, 3, 0])
    # Younger, and over.
    assert sorted(tree.let_go(4, 2)) == [3, 4]
    assert tree.evict(9) == [4, 3, 2, 1, 0]


def test_what_another_path_has_used_stays_though_that_is_gone(tree):
    path(tree, "sab", 3, [0, 1, 2])
    path(tree, "sxy", 3, [0, 3, 4], start=1)
    tree.release([2, 1])
    assert tree.evict(2) == [2, 1]
    path(tree, "q", 1, [5])
    tree.release([5])
    tree.release([4, 3, 0])
    assert sorted(tree.let_go(4, 2)) == [3, 4]
    assert tree.evict(9) == [4, 3, 5, 0]


def test_a_request_that_found_a_part_of_a_path_has_used_it(tree):
    path(tree, "abc", 3, [0, 1, 2])
    tree.note_parting(1)
    tree.release([2, 1, 0])
    assert tree.let_go(2, 2) == [2]


def test_what_was_found_is_known_still_when_another_branch_is_gone(tree):
    path(tree, "sabc", 4, [0, 1, 2, 3])
    path(tree, "sx", 2, [0, 4], start=1)
    tree.note_parting(2)
    tree.release([4])
    assert tree.evict(1) == [4]
    tree.release([3, 2, 1, 0])
    assert tree.let_go(3, 3) == [3]


def test_what_was_found_is_forgotten_with_the_blocks(tree):
    path(tree, "abc", 3, [0, 1, 2])
    tree.note_parting(1)
    tree.release([2, 1, 0])
    assert tree.evict(2) == [2, 1]
    tree.acquire([0])
    path(tree, "axy", 3, [0, 3, 4], start=1)
    tree.release([4, 3, 0])
    assert sorted(tree.let_go(4, 2)) == [3, 4]


def test_a_request_that_goes_on_from_the_end_is_the_same_session(tree):
    path(tree, "ab", 2, [0, 1])
    tree.note_parting(1)
    path(tree, "abc", 3, [0, 1, 2], start=2)
    tree.release([2, 1, 0])
    assert sorted(tree.let_go(2, 2)) == [0, 1, 2]


def test_a_request_does_not_part_from_its_own_blocks(tree):
    path(tree, "ab", 2, [0, 1])
    path(tree, "abc", 3, [0, 1, 2], start=2)
    tree.note_parting(1, follower=2)
    tree.release([2, 1, 0])
    assert sorted(tree.let_go(2, 2)) == [0, 1, 2]


def test_what_two_requests_hold_at_once_is_shared(tree):
    path(tree, "ab", 2, [0, 1])
    tree.note_parting(1, shared=True)
    tree.release([1, 0])
    assert tree.let_go(1, 1) == []


def test_nothing_goes_first_where_another_goes_on_or_holds_it(tree):
    path(tree, "abc", 3, [0, 1, 2])
    tree.release([2, 1])
    assert tree.let_go(1, 1) == [], "the path goes on"
    assert sorted(tree.let_go(2, 2)) == [1, 2], "the first block is held"


def test_nothing_goes_first_that_is_pinned_or_before_it(tree):
    path(tree, "abc", 3, [0, 1, 2])
    tree.release([2, 1, 0])
    tree.pin(1)
    assert tree.let_go(2, 2) == [2]
    tree.unpin(1)
    path(tree, "q", 1, [3])
    tree.release([3])
    assert tree.evict(9) == [2, 1, 0, 3]


def test_an_end_that_is_known_no_more_lets_nothing_go(tree):
    path(tree, "ab", 2, [0, 1])
    tree.release([1, 0])
    assert tree.let_go(1, 0) == tree.let_go(7, 1) == []


def test_a_hit_part_of_a_block_goes_with_what_is_before_it(tree):
    path(tree, "a", 1, [0])
    tree.insert_partial(encode([97, 97, 98]), [0, 1])
    tree.note_hit(1)
    path(tree, "q", 1, [2])
    tree.release([2])
    tree.release([1, 0])
    assert tree.let_go(0, 0) == [1, 0]
    assert tree.evict(3) == [1, 0, 2]


def test_what_is_used_again_is_evicted_as_all_others(tree):
    path(tree, "ab", 2, [0, 1])
    tree.release([1, 0])
    path(tree, "q", 1, [2])
    tree.release([2])
    tree.let_go(1, 1)
    tree.acquire([0, 1])
    tree.release([1, 0])
    assert tree.evict(3) == [2, 1, 0]


def test_levels_say_what_goes_sooner(tree):
    for at, name in enumerate("abc"):
        path(tree, name, 1, [at])
        tree.release([at])
    tree.let_go(0, 0, level=3)
    tree.let_go(2, 0, level=1)
    assert tree.evict(3) == [2, 0, 1]


def test_what_is_kept_goes_after_others_by_level_and_before_what_is_pinned(tree):
    for at, name in enumerate("abcd"):
        path(tree, name, 1, [at])
        tree.release([at])
    tree.pin(0)
    assert tree.keep(1, 5) and tree.keep(2, 0)
    assert tree.evict(4) == [3, 2, 1, 0]
    assert tree.num_kept == 0


def test_a_kept_block_keeps_what_is_before_it(tree):
    path(tree, "abc", 3, [0, 1, 2])
    tree.release([2, 1, 0])
    path(tree, "q", 1, [3])
    tree.release([3])
    tree.keep(1)
    assert tree.evict(4) == [2, 3, 1, 0]


def test_a_kept_block_stays_though_others_of_its_run_go(tree):
    path(tree, "abc", 3, [0, 1, 2])
    path(tree, "q", 1, [3])
    tree.note_end([0, 1, 2], None, 0, 0)
    tree.note_end([3], None, 999, 99_999)
    tree.release([2, 1, 0])
    tree.release([3])
    tree.keep(1)
    evicted = tree.evict(4)
    assert set(evicted[:2]) == {2, 3} and evicted[2:] == [1, 0]


def test_what_is_kept_no_more_is_evicted_as_all_others(tree):
    path(tree, "ab", 2, [0, 1])
    tree.keep(1)
    tree.release([1, 0])
    path(tree, "q", 1, [2])
    tree.release([2])
    tree.unkeep(1)
    assert tree.evict(3) == [1, 0, 2]


def test_the_keeper_learns_of_all_that_is_kept_no_more(tree):
    lost = []
    tree.on_unkept = lost.append
    for at, name in enumerate("abcde"):
        path(tree, name, 1, [at])
        tree.keep(at)
        tree.release([at])
    tree.unkeep(0)
    tree.let_go(1, 0)
    tree.discard(2)
    assert lost == [0, 1, 2]
    tree.evict(5)
    assert sorted(lost) == [0, 1, 2, 3, 4]
    tree.reset()
    path(tree, "a", 1, [0])
    tree.keep(0)
    tree.unkeep(0)
    assert lost[-1] == 0 and len(lost) == 6


def test_what_is_not_cached_is_not_kept(tree):
    assert not tree.keep(3)
    path(tree, "a", 1, [0])
    path(tree, "a", 1, [1])
    assert not tree.keep(1) and tree.resident(1) == 0


@pytest.mark.parametrize("how", ["keep", "pin"])
def test_a_kept_or_pinned_block_that_is_dropped_leaves_its_class(tree, how):
    path(tree, "abc", 3, [0, 1, 2])
    tree.release([2, 1, 0])
    if how == "keep":
        tree.keep(2, 5)
    else:
        tree.pin(2)
    assert tree.discard(2)
    tree.check()
    assert tree.evict(9) == [1, 0]
