"""The tree of waiting requests, against comparing everything with everything."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import Backlog, Waiting, view_of
from vllm_radix.tree import BYTES_PER_TOKEN, encode

UNHURRIED = settings(deadline=None)
BLOCK = 2
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


def filled(requests):
    backlog = Backlog(BLOCK * BYTES_PER_TOKEN)
    entries = []
    for arrival, (text, space, cached, computing) in enumerate(requests):
        entry = Waiting(str(arrival), arrival, key=key(text), namespace=space)
        entry.cached, entry.computing = cached, computing
        backlog.add(entry)
        entries.append(entry)
    return backlog, entries


def verify(backlog, present):
    backlog.check()
    assert len(backlog) == len(present)
    assert {entry.id for entry in backlog.entries} == {entry.id for entry in present}
    seen = []
    for entry in backlog.entries:
        if entry.namespace not in seen:
            seen.append(entry.namespace)
    in_order = sorted(
        present, key=lambda e: (seen.index(e.namespace), e.key, e.arrival)
    )
    assert [e.id for e in backlog.entries] == [e.id for e in in_order]
    shared = [common(one, two) for one, two in pairwise(in_order)]
    assert backlog.shared == ([0, *shared] if present else [])
    assert backlog.num_related == sum(blocks > 0 for blocks in shared)


@UNHURRIED
@given(st.lists(REQUEST, max_size=12), st.lists(st.integers(0, 99), max_size=30))
def test_neighbours_share_what_they_share_whoever_comes_and_goes(requests, goes):
    backlog, present = filled([])
    away = filled(requests)[1]
    for number in goes:
        if number % 3 and away:
            entry = away.pop(number % len(away))
            backlog.add(entry)
            present.append(entry)
        elif present:
            entry = present.pop(number % len(present))
            backlog.remove(entry)
            away.append(entry)
        verify(backlog, present)


@UNHURRIED
@given(st.lists(TEXT, max_size=8))
def test_the_neighbours_of_one_that_goes_are_compared(texts):
    for gone in range(len(texts)):
        backlog, entries = filled([(text, None, 0, False) for text in texts])
        backlog.remove(entries.pop(gone))
        verify(backlog, entries)


@UNHURRIED
@given(st.lists(REQUEST, max_size=12))
def test_a_place_is_found_again(requests):
    backlog, entries = filled(requests)
    for entry in entries:
        assert backlog.entries[backlog.find(entry)] is entry


@UNHURRIED
@given(st.lists(REQUEST, min_size=1, max_size=12), st.integers(0, 4))
def test_those_wait_who_share_more_than_is_published_and_cached(requests, published):
    backlog, entries = filled(requests)
    for leader in entries:
        expected = {
            other.id
            for other in entries
            if other is not leader
            and not other.computing
            and common(leader, other) > max(published, other.cached)
        }
        found = [other.id for other in backlog.waiting_for(leader, published)]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_the_docstrings_tree():
    texts = ["ssaaAA", "ssaaBB", "ssbb"]
    backlog, _ = filled([(text, None, 0, False) for text in texts])
    assert backlog.shared == [0, 2, 1]


def test_emptied_namespaces_are_forgotten():
    backlog, entries = filled([("xx", space, 0, False) for space in range(5)])
    for entry in entries:
        backlog.remove(entry)
    backlog.check()
    assert not backlog._spaces
    backlog.add(entries[3])
    backlog.check()


@pytest.mark.parametrize("namespace", [None, "other"])
def test_nobody_waits_for_another_namespace(namespace):
    backlog, entries = filled([("xxyy", None, 0, False), ("xxyy", namespace, 0, False)])
    found = backlog.waiting_for(entries[0], 0)
    assert found == ([] if namespace else [entries[1]])


def test_a_view_shows_the_backlog_in_order_of_its_tokens():
    backlog = Backlog(BLOCK * BYTES_PER_TOKEN)
    one = Waiting("one", 0, work=1, key=key("yy"), tokens=3, blocks=2, cached=1)
    two = Waiting("two", 1, work=4, key=key("xxyy"), tokens=5, blocks=3, computing=True)
    three = Waiting("three", 2, work=5, key=key("xxxx"), tokens=4, blocks=2, cached=2)
    for entry in (one, two, three):
        backlog.add(entry)
    view = view_of(backlog, 10, BLOCK, 0.5)
    assert view.arrival.tolist() == [2, 1, 0]
    assert view.shared.tolist() == [0, 1, 0]
    assert view.cached.tolist() == [2, 0, 1]
    assert view.blocks.tolist() == [2, 3, 2]
    assert view.tokens.tolist() == [4, 5, 3]
    assert view.age.tolist() == [5, 6, 9]
    assert view.left.tolist() == [True, False, True]
    assert view.uncached.tolist() == [1, 5, 1], "one token is computed at least"
    assert (view.block_size, view.pace) == (BLOCK, 0.5)
