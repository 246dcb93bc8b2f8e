"""The tree of waiting requests, against comparing everything with everything."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import WaitingRequest, WaitingTree, view_of_queue
from vllm_radix.tree import BYTES_PER_TOKEN, encode

UNHURRIED = settings(deadline=None, max_examples=60)
BLOCK = 2
MANY = 32
TEXT = st.text("xy", max_size=7)
SPACES = [None, "salt", ("lora", 1)]
REQUEST = st.tuples(TEXT, st.sampled_from(SPACES), st.integers(0, 3), st.booleans())


def key(text):
    """One token a letter."""
    return encode([ord(letter) for letter in text])


def common(one, two):
    """Whole blocks that two requests share."""
    if one.namespace != two.namespace:
        return 0
    size = BLOCK * BYTES_PER_TOKEN
    count = 0
    while True:
        end = (count + 1) * size
        if min(len(one.key), len(two.key)) < end or one.key[:end] != two.key[:end]:
            return count
        count += 1


def entries_of(requests, first=0):
    entries = []
    for arrival, (text, space, cached, computing) in enumerate(requests, first):
        entry = WaitingRequest(str(arrival), arrival, key=key(text), namespace=space)
        entry.blocks = len(text) // BLOCK + 1
        entry.cached, entry.computing = cached, computing
        entries.append(entry)
    return entries


def empty():
    return WaitingTree(BLOCK * BYTES_PER_TOKEN)


def filled(requests):
    tree, entries = empty(), entries_of(requests)
    for entry in entries:
        tree.add(entry)
    return tree, entries


def plain(texts):
    return [(text, None, 0, False) for text in texts]


def verify(tree, present):
    tree.check()
    assert len(tree) == len(present)
    seen = list(dict.fromkeys(entry.namespace for entry in tree.entries()))
    in_order = sorted(
        present, key=lambda e: (seen.index(e.namespace), e.key, e.arrival)
    )
    assert [e.id for e in tree.entries()] == [e.id for e in in_order]
    shared = [common(one, two) for one, two in pairwise(in_order)]
    assert tree.shared() == ([0, *shared] if present else [])


def unique_blocks(entries):
    """The blocks of some requests, shared ones once, and each its last one."""
    size = BLOCK * BYTES_PER_TOKEN
    whole = {
        (entry.namespace, entry.key[:end])
        for entry in entries
        for end in range(size, len(entry.key) + 1, size)
    }
    return len(whole) + len(entries)


@pytest.mark.parametrize("looked_at", [True, False])
@UNHURRIED
@given(
    requests=st.lists(REQUEST, max_size=12),
    goes=st.lists(st.integers(0, 99), max_size=30),
)
def test_add_remove_any_order_neighbours_share_what_they_share(
    looked_at, requests, goes
):
    tree, present, away = empty(), [], entries_of(requests)
    for number in goes:
        if number % 3 and away:
            entry = away.pop(number % len(away))
            tree.add(entry)
            present.append(entry)
        elif present:
            entry = present.pop(number % len(present))
            tree.remove(entry)
            away.append(entry)
        tree.check()
        if looked_at:
            verify(tree, present)
    verify(tree, present)


@UNHURRIED
@given(st.lists(TEXT, max_size=8))
def test_remove_each_one_its_neighbours_are_compared(texts):
    for gone in range(len(texts)):
        tree, entries = filled(plain(texts))
        tree.remove(entries.pop(gone))
        verify(tree, entries)


def test_remove_one_not_in_the_tree_is_refused():
    tree, _ = filled(plain(["xx", "xy", "yy"]))
    with pytest.raises(AssertionError, match="not in the tree"):
        tree.remove(entries_of(plain(["xx"]))[0])


@UNHURRIED
@given(st.lists(REQUEST, max_size=12))
def test_add_equal_keys_are_in_order_of_arrival(requests):
    tree, entries = empty(), entries_of(requests)
    for entry in reversed(entries):
        tree.add(entry)
    verify(tree, entries)
    for one, two in pairwise(tree.entries()):
        if one.namespace == two.namespace and one.key == two.key:
            assert one.arrival < two.arrival


@UNHURRIED
@given(
    st.lists(REQUEST, max_size=10),
    st.lists(REQUEST, min_size=MANY, max_size=MANY + 10),
    st.integers(0, 3),
)
def test_add_all_many_equals_one_by_one(before, new, published):
    one_by_one, _ = filled(before)
    for entry in entries_of(new, len(before)):
        one_by_one.add(entry)
    bulk, old = filled(before)
    fresh = entries_of(new, len(before))
    bulk.add_all(fresh)
    verify(bulk, old + fresh)

    def sharers(tree, entry):
        found = tree.sharing_more(entry, lambda other: published)
        return [(other.id, blocks) for other, blocks in found]

    by_id = {entry.id: entry for entry in bulk.entries()}
    for entry in one_by_one.entries():
        assert sharers(one_by_one, entry) == sharers(bulk, by_id[entry.id])
    for entry in old + fresh:
        bulk.remove(entry)
    verify(bulk, [])


def test_add_all_few_compares_each_with_both_neighbours():
    tree, _ = filled(plain(["xxyy"]))
    few = entries_of(plain(["xxxx"] * (MANY - 1)), 1)
    tree.add_all(few)
    assert [entry.shared_before for entry in few] == [1] + [2] * (MANY - 2)
    tree.check()


@UNHURRIED
@given(st.lists(REQUEST, max_size=20))
def test_add_shared_before_is_the_most_shared_with_an_older_one(requests):
    tree = empty()
    older = []
    for entry in entries_of(requests):
        tree.add(entry)
        expected = max((common(entry, other) for other in older), default=0)
        assert entry.shared_before == expected
        older.append(entry)
    own = sum(entry.blocks - entry.shared_before for entry in older)
    assert own == unique_blocks(older)


@UNHURRIED
@given(st.lists(REQUEST, min_size=MANY, max_size=MANY + 10))
def test_add_all_empty_tree_shared_blocks_are_counted_once(requests):
    tree, entries = empty(), entries_of(requests)
    tree.add_all(entries)
    own = sum(entry.blocks - entry.shared_before for entry in entries)
    assert own == unique_blocks(entries)
    # Of those that came together the first in order of tokens counts as older.
    for one, two in pairwise([None, *tree.entries()]):
        assert two.shared_before == (common(one, two) if one else 0)


def test_add_all_many_an_older_one_behind_is_compared_as_well():
    # The older one sorts behind the new one that shares its first block.
    others = [chr(ord("A") + number) * 2 for number in range(MANY - 1)]
    tree, old = filled(plain(["xxyy"]))
    fresh = entries_of(plain(["xxxx", *others]), 1)
    tree.add_all(fresh)
    assert fresh[0].shared_before == 1
    entries = old + fresh
    own = sum(entry.blocks - entry.shared_before for entry in entries)
    assert own == unique_blocks(entries)


@UNHURRIED
@given(st.lists(REQUEST, min_size=1, max_size=12))
def test_sharing_more_any_requests_yields_all_that_share_more(requests):
    tree, entries = filled(requests)
    for one in entries:
        found = [
            (other.id, blocks)
            for other, blocks in tree.sharing_more(one, lambda other: 1)
        ]
        expected = {
            (other.id, common(one, other))
            for other in entries
            if other is not one and common(one, other) > 1
        }
        assert len(found) == len(expected)
        assert set(found) == expected


@UNHURRIED
@given(st.lists(TEXT, min_size=1, max_size=10), st.lists(TEXT, max_size=3))
def test_sharing_more_than_cached_yields_all_that_do(texts, warm):
    # What is cached is as in a cache: the same for all below a node.
    tree, entries = filled(plain(texts))
    cache = entries_of(plain(warm), 100)
    for entry in entries:
        entry.cached = max((common(entry, other) for other in cache), default=0)
    for one in entries:
        found = {
            other.id for other, _ in tree.sharing_more(one, lambda other: other.cached)
        }
        assert found == {
            other.id
            for other in entries
            if other is not one and common(one, other) > other.cached
        }


def test_sharing_more_nearest_comes_first_on_either_side():
    tree, entries = filled(plain(["xx", "xxxx", "xxxxxx", "xxxxxxxx", "xxxxyy"]))
    found = list(tree.sharing_more(entries[2], lambda other: 0))
    assert [(other.id, blocks) for other, blocks in found] == [
        ("3", 3),
        ("4", 2),
        ("1", 2),
        ("0", 1),
    ]


@UNHURRIED
@given(st.lists(REQUEST, min_size=1, max_size=12), st.integers(0, 4))
def test_uncached_sharers_any_requests_share_more_than_published_and_cached(
    requests, published
):
    tree, entries = filled(requests)
    for leader in entries:
        expected = {
            other.id
            for other in entries
            if other is not leader
            and not other.computing
            and common(leader, other) > max(published, other.cached)
        }
        found = [other.id for other in tree.uncached_sharers(leader, published)]
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize("namespace", [None, "other"])
def test_uncached_sharers_other_namespace_never_share(namespace):
    requests = [("xxyy", None, 0, False), ("xxyy", namespace, 0, False)]
    tree, entries = filled(requests)
    found = tree.uncached_sharers(entries[0], 0)
    assert found == ([] if namespace else [entries[1]])
    assert entries[1].shared_before == (0 if namespace else 2)


def test_shared_docstring_example_is_so():
    tree, _ = filled(plain(["ssaaAA", "ssaaBB", "ssbb"]))
    assert tree.shared() == [0, 2, 1]


def test_remove_last_of_a_namespace_forgets_it():
    tree, entries = filled([("xx", space, 0, False) for space in range(5)])
    for entry in entries:
        tree.remove(entry)
    assert not tree._levels
    tree.add(entries[3])
    verify(tree, [entries[3]])


def test_view_of_queue_shows_requests_in_order_of_their_tokens():
    tree = empty()
    one = WaitingRequest("one", 0, 0.0, 1, key("yy"), tokens=3, blocks=2, cached=1)
    two = WaitingRequest("two", 1, 0.0, 4, key("xxyy"), tokens=5, blocks=3)
    three = WaitingRequest("three", 2, 0.0, 5, key("xxxx"), tokens=4, blocks=2)
    two.computing, three.cached = True, 2
    for entry in (one, two, three):
        tree.add(entry)
    view = view_of_queue(tree, 10, BLOCK)
    assert view.arrival.tolist() == [2, 1, 0]
    assert view.shared.tolist() == [0, 1, 0]
    assert view.cached.tolist() == [2, 0, 1]
    assert view.blocks.tolist() == [2, 3, 2]
    assert view.tokens.tolist() == [4, 5, 3]
    assert view.age.tolist() == [5, 6, 9]
    assert view.selectable.tolist() == [True, False, True]
    assert view.planned.tolist() == [False, True, False]
    assert view.uncached.tolist() == [1, 5, 1], "one token is computed at least"
    assert view.block_size == BLOCK


def test_view_at_some_places_are_those_requests():
    tree, _ = filled(plain(["xx", "yy", "xxyy", "yyyy"]))
    view = view_of_queue(tree, 10, BLOCK)
    some = view.at([3, 1])
    assert some.arrival.tolist() == view.arrival[[3, 1]].tolist()
    assert some.blocks.tolist() == view.blocks[[3, 1]].tolist()
    assert some.shared.tolist() == [0, 0]


def test_held_for_adds_up_all_times_held():
    entry = WaitingRequest("one", 0, held_before=2.0)
    assert entry.held_for(7.0) == 2.0
    entry.held_since = 4.0
    assert entry.held_for(7.0) == 5.0
