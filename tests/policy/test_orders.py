"""The orders, one by one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import ORDERS, Backlog, Waiting, view_of
from vllm_radix.policy.groups import shares
from vllm_radix.tree import BYTES_PER_TOKEN, encode

UNHURRIED = settings(deadline=None, max_examples=50)
SIZE = 2
TEXT = st.text("xyz", max_size=5)


def common(one, two):
    count = 0
    while one[: count + 1] == two[: count + 1] and count < min(len(one), len(two)):
        count += 1
    return count


def view_from(requests, warm=(), now=0):
    """Requests are (text, tokens after it, work when it came); a letter is a block."""
    backlog = Backlog(SIZE * BYTES_PER_TOKEN)
    for arrival, (text, tail, work) in enumerate(requests):
        key = encode([ord(letter) for letter in text for _ in range(SIZE)])
        tokens = len(text) * SIZE + tail
        entry = Waiting(text, arrival, work=work, key=key, tokens=tokens)
        entry.blocks = -(-tokens // SIZE)
        entry.cached = max((common(text, other) for other in warm), default=0)
        backlog.add(entry)
    return view_of(backlog, now, SIZE), [e.id for e in backlog.entries]


@st.composite
def views(draw):
    requests = st.tuples(TEXT, st.integers(1, 4), st.integers(0, 9))
    made = draw(st.lists(requests, max_size=9))
    made.sort(key=lambda request: request[2])
    view, texts = view_from(made, draw(st.lists(TEXT, max_size=3)), 10)
    flags = st.lists(st.booleans(), min_size=len(made), max_size=len(made))
    view.left = np.array(draw(flags), np.bool_)
    return view, texts


def ranked(name, view):
    keys = [*ORDERS[name]().scores(view), view.arrival]
    return sorted(range(len(view.arrival)), key=lambda at: [key[at] for key in keys])


@pytest.mark.parametrize("name", ORDERS)
@UNHURRIED
@given(made=views())
def test_an_order_ranks_everybody_once(name, made):
    view, texts = made
    assert sorted(ranked(name, view)) == list(range(len(texts)))


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "dfs"])
def test_equals_go_in_order_of_arrival(name):
    view, _ = view_from([("xy", 1, 0)] * 5, now=1)
    assert view.arrival[ranked(name, view)].tolist() == [0, 1, 2, 3, 4]


def by(view, score):
    places = range(len(view.arrival))
    return sorted(places, key=lambda at: (score(at), view.arrival[at]))


@UNHURRIED
@given(views())
def test_first_come_first_served(made):
    view, _ = made
    assert ranked("fcfs", view) == by(view, lambda at: 0)


@pytest.mark.parametrize("name", ["lpm", "k-lpm", "prefix"])
@UNHURRIED
@given(made=views())
def test_the_longest_cached_prefix_goes_first(name, made):
    view, _ = made
    assert ranked(name, view) == by(view, lambda at: -view.cached[at])


@UNHURRIED
@given(views())
def test_the_shortest_work_goes_first(made):
    view, _ = made
    assert ranked("shortest", view) == by(view, lambda at: view.uncached[at])


@UNHURRIED
@given(views())
def test_the_best_group_goes_first(made):
    view, _ = made
    part, rate = shares(view)
    assert ranked("horn", view) == by(view, lambda at: (rate[at], part[at]))


def test_a_large_group_goes_before_shorter_requests():
    group = [("xyxyx" + end, 1, 0) for end in "xyz"]
    view, texts = view_from([("zzz", 1, 0), *group])
    assert view.uncached[texts.index("zzz")] < view.uncached.max()
    assert texts[ranked("horn", view)[-1]] == "zzz"
    view, texts = view_from([("zzz", 1, 0), *group[:2]])
    assert texts[ranked("horn", view)[0]] == "zzz", "two are not worth it"


@UNHURRIED
@given(views())
def test_depth_first_keeps_subtrees_together(made):
    view, texts = made
    order = [texts[place] for place in ranked("dfs", view)]
    for node in {text[:end] for text in texts for end in range(len(text) + 1)}:
        inside = [text.startswith(node) for text in order]
        enters = sum(here > before for before, here in pairwise([False, *inside]))
        assert enters <= 1


@UNHURRIED
@given(views())
def test_depth_first_starts_with_what_is_cached(made):
    view, _ = made
    if view.left.any():
        first = ranked("dfs", view)[0]
        assert view.left[first]
        assert view.cached[first] == view.cached[view.left].max()


def test_depth_first_does_not_cut_the_warm_subtree_in_two():
    view, texts = view_from([("xx", 1, 0), ("xyy", 1, 0), ("z", 1, 0)], ["xyy"])
    order = [texts[place] for place in ranked("dfs", view)]
    assert order == ["xyy", "xx", "z"]


def test_the_response_ratio_ages():
    def first(now):
        # 10 tokens from the start, 1 token from the ninth on.
        view, texts = view_from([("x" * 4, 2, 0), ("", 1, 9)], (), now)
        return texts[ranked("hrrn", view)[0]]

    assert first(9) == "xxxx", "0.9 against 0"
    assert first(20) == "", "2 against 11"


@UNHURRIED
@given(views())
def test_the_response_ratio_is_that_of_age_and_work(made):
    view, _ = made
    order = ranked("hrrn", view)
    ratios = (view.age / view.uncached)[order]
    assert (np.diff(ratios) <= 1e-9).all()
