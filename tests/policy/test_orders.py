"""The orders, one by one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import SmallQueue

from vllm_radix.policy import ORDERS
from vllm_radix.policy.orders import Window
from vllm_radix.policy.prefix_groups import work_shares

UNHURRIED = settings(deadline=None, max_examples=50)
TEXT = st.text("xyz", max_size=5)


def view_from(requests, warm=(), now=0):
    """Requests are (text, tokens after it, work when it came)."""
    texts = [text for text, _, _ in requests]
    tails = [tail for _, tail, _ in requests]
    ages = [now - work for _, _, work in requests]
    return SmallQueue(texts, warm, tails=tails, ages=ages).view()


@st.composite
def views(draw):
    requests = st.tuples(TEXT, st.integers(1, 4), st.integers(0, 9))
    made = draw(st.lists(requests, max_size=9))
    made.sort(key=lambda request: request[2])
    view, texts = view_from(made, draw(st.lists(TEXT, max_size=3)), 10)
    flags = st.lists(st.booleans(), min_size=len(made), max_size=len(made))
    view.selectable = np.array(draw(flags), np.bool_)
    return view, texts


def ranked(name, view):
    keys = [*ORDERS[name]().scores(view), view.arrival]
    return sorted(range(len(view.arrival)), key=lambda at: [key[at] for key in keys])


@pytest.mark.parametrize("name", ORDERS)
@UNHURRIED
@given(made=views())
def test_scores_any_order_rank_everybody_once(name, made):
    view, texts = made
    assert sorted(ranked(name, view)) == list(range(len(texts)))


@pytest.mark.parametrize("name", ORDERS)
def test_scores_equal_requests_go_in_order_of_arrival(name):
    view, _ = view_from([("xy", 1, 0)] * 5, now=1)
    assert view.arrival[ranked(name, view)].tolist() == [0, 1, 2, 3, 4]


def by(view, score):
    places = range(len(view.arrival))
    return sorted(places, key=lambda at: (score(at), view.arrival[at]))


@UNHURRIED
@given(views())
def test_fcfs_any_queue_goes_in_order_of_arrival(made):
    view, _ = made
    assert ranked("fcfs", view) == by(view, lambda at: 0)


@pytest.mark.parametrize("name", ["lpm", "k-lpm", "prefix"])
@UNHURRIED
@given(made=views())
def test_longest_prefix_any_queue_most_cached_goes_first(name, made):
    view, _ = made
    assert ranked(name, view) == by(view, lambda at: -view.cached[at])


@UNHURRIED
@given(views())
def test_shortest_any_queue_fewest_uncached_tokens_go_first(made):
    view, _ = made
    assert ranked("shortest", view) == by(view, lambda at: view.uncached[at])


@UNHURRIED
@given(views())
def test_least_work_group_any_queue_best_group_goes_first(made):
    view, _ = made
    part, rate = work_shares(view)
    assert ranked("least-work-group", view) == by(view, lambda at: (rate[at], part[at]))


def test_least_work_group_large_group_goes_before_shorter_requests():
    group = [("xyxyx" + end, 1, 0) for end in "xyz"]
    view, texts = view_from([("zzz", 1, 0), *group])
    assert view.uncached[texts.index("zzz")] < view.uncached.max()
    assert texts[ranked("least-work-group", view)[-1]] == "zzz"
    view, texts = view_from([("zzz", 1, 0), *group[:2]])
    assert texts[ranked("least-work-group", view)[0]] == "zzz", "two are not worth it"


@UNHURRIED
@given(views())
def test_depth_first_any_queue_keeps_subtrees_together(made):
    view, texts = made
    order = [texts[place] for place in ranked("dfs", view)]
    for node in {text[:end] for text in texts for end in range(len(text) + 1)}:
        inside = [text.startswith(node) for text in order]
        enters = sum(here > before for before, here in pairwise([False, *inside]))
        assert enters <= 1


@UNHURRIED
@given(views())
def test_depth_first_any_queue_starts_with_what_is_cached(made):
    view, _ = made
    if view.selectable.any():
        first = ranked("dfs", view)[0]
        assert view.selectable[first]
        assert view.cached[first] == view.cached[view.selectable].max()


def test_depth_first_warm_subtree_is_not_cut_in_two():
    view, texts = view_from([("xx", 1, 0), ("xyy", 1, 0), ("z", 1, 0)], ["xyy"])
    order = [texts[place] for place in ranked("dfs", view)]
    assert order == ["xyy", "xx", "z"]


def test_response_ratio_later_favours_who_waited_for_less_work():
    def first(now):
        # 10 tokens from the start, 1 token from the ninth on.
        view, texts = view_from([("x" * 4, 2, 0), ("", 1, 9)], (), now)
        return texts[ranked("hrrn", view)[0]]

    assert first(9) == "xxxx", "0.9 against 0"
    assert first(20) == "", "2 against 11"


@UNHURRIED
@given(views())
def test_response_ratio_any_queue_is_that_of_age_and_work(made):
    view, _ = made
    order = ranked("hrrn", view)
    ratios = (view.age / view.uncached)[order]
    assert (np.diff(ratios) <= 1e-9).all()


def window(view, width):
    order = Window()
    order.width = width
    (score,) = order.scores(view)
    return sorted(range(len(score)), key=lambda at: (score[at], view.arrival[at]))


@UNHURRIED
@given(views(), st.integers(1, 9), st.data())
def test_window_any_queue_most_cached_of_the_oldest_few_go_first(made, width, data):
    view, _ = made
    count = len(view.arrival)
    # Those that are planned already do not count, and stop nobody.
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    view.planned = np.array(flags, np.bool_)
    view.selectable &= ~view.planned
    by_age = sorted(range(count), key=lambda at: view.arrival[at])
    inside = []
    for at in by_age:
        if not view.selectable[at] and not view.planned[at]:
            break
        if view.selectable[at]:
            inside.append(at)
    inside = inside[:width]
    best = sorted(inside, key=lambda at: (-view.cached[at], view.arrival[at]))
    warm = [at for at in best if view.cached[at]]
    rest = [at for at in by_age if at not in warm]
    assert window(view, width) == warm + rest


def test_window_more_than_width_wait_looks_at_no_more():
    requests = [("a", 1, 0)] * 32 + [("x", 1, 0)]
    view, _ = view_from(requests, ["x"])
    assert view.arrival[ranked("window", view)].tolist() == list(range(33))
    view, _ = view_from(requests[1:], ["x"])
    assert view.arrival[ranked("window", view)].tolist() == [31, *range(31)]


def test_window_blocked_request_is_never_passed():
    view, texts = view_from([("a", 1, 0), ("b", 1, 0), ("x", 1, 0)], ["x"])
    assert texts[ranked("window", view)[0]] == "x"
    view.selectable[texts.index("b")] = False
    assert [texts[at] for at in ranked("window", view)] == ["a", "b", "x"]
    view.planned[texts.index("b")] = True
    assert texts[ranked("window", view)[0]] == "x"
