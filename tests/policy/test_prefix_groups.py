"""Groups and their shares, against a count of every block of every request."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import SIZE, SmallQueue, common

from vllm_radix.policy.prefix_groups import group_bounds, work_shares

UNHURRIED = settings(deadline=None, max_examples=60)
TEXT = st.text("xyz", max_size=5)


def view_from(requests, warm=(), computing=()):
    """Each request is a text and the tokens after it, at least one, its own."""
    texts, tails = zip(*requests, strict=True) if requests else ((), ())
    queue = SmallQueue(texts, warm, tails=tails)
    for arrival in computing:
        queue.entries[arrival].computing = True
    return queue.view()


def nodes(view, texts, place):
    """The uncached blocks of a request, each as the text up to its end."""
    text = texts[place]
    return {text[:end] for end in range(int(view.cached[place]) + 1, len(text) + 1)}


def work(view, texts, places):
    """Tokens to compute for some requests, shared blocks once."""
    blocks = set().union(*(nodes(view, texts, place) for place in places))
    tails = sum(int(view.tokens[at]) - len(texts[at]) * SIZE for at in places)
    return len(blocks) * SIZE + tails


@st.composite
def views(draw, all_selectable=True):
    requests = st.tuples(TEXT, st.integers(1, SIZE))
    made = draw(st.lists(requests, min_size=1, max_size=9))
    view, texts = view_from(made, draw(st.lists(TEXT, max_size=3)))
    if not all_selectable:
        flags = st.lists(st.booleans(), min_size=len(made), max_size=len(made))
        view.selectable = np.array(draw(flags), np.bool_)
    return view, texts


@UNHURRIED
@given(views())
def test_group_bounds_any_queue_are_those_who_share_something_uncached(made):
    view, texts = made
    groups = []
    for at in range(len(texts)):
        if at and common(texts[at - 1], texts[at]) > view.cached[at]:
            groups[-1].append(at)
        else:
            groups.append([at])
    expected = [(group[0], group[-1]) for group in groups if len(group) > 1]
    assert group_bounds(view) == expected
    for first, last in expected:
        assert len(set(view.cached[first : last + 1])) == 1


@UNHURRIED
@given(views(all_selectable=False))
def test_work_shares_any_queue_parts_add_up_to_the_work(made):
    view, texts = made
    part, _ = work_shares(view)
    left = [int(at) for at in view.selectable.nonzero()[0]]
    for at in left:
        expected = int(view.tokens[at]) - len(texts[at]) * SIZE
        for block in nodes(view, texts, at):
            members = sum(texts[other].startswith(block) for other in left)
            expected += SIZE / members
        assert part[at] == pytest.approx(expected)
        assert part[at] <= view.uncached[at] + 1e-9
    assert part[left].sum() == pytest.approx(work(view, texts, left) if left else 0)


def least_rate(view, texts, place):
    """The least work per request of all groups that a request is in."""
    left = [int(at) for at in view.selectable.nonzero()[0]]
    rates = [float(view.uncached[place])]
    for block in nodes(view, texts, place):
        members = [at for at in left if texts[at].startswith(block)]
        rates.append(work(view, texts, members) / len(members))
    return min(rates)


@UNHURRIED
@given(views())
def test_work_shares_any_queue_rates_are_those_of_the_best_group(made):
    view, texts = made
    part, rate = work_shares(view)
    for place in range(len(texts)):
        assert rate[place] == pytest.approx(least_rate(view, texts, place))
    assert rate.sum() <= part.sum() + 1e-6, "a group's rate is its members' mean part"


def test_work_shares_needed_by_nobody_left_is_in_no_rate():
    # Nobody who is left needs xy.
    view, texts = view_from([("xyx", 1), ("xyy", 1), ("xz", 1), ("xx", 1)])
    for name in ("xyx", "xyy"):
        view.selectable[texts.index(name)] = False
    _, rate = work_shares(view)
    for place in view.selectable.nonzero()[0]:
        assert rate[place] == pytest.approx(least_rate(view, texts, place))


def test_work_shares_computing_one_may_share_less_than_neighbour_has_cached():
    # xy was admitted when nothing was cached and is still computing; xxx has been
    # cached by another since.
    view, _ = view_from([("xxxy", 1), ("xy", 1)], warm=["xxx"], computing=[1])
    view.cached[1] = 0
    part, rate = work_shares(view)
    assert part[0] == rate[0] == view.uncached[0]


def test_group_bounds_no_requests_no_groups():
    view, _ = view_from([])
    assert group_bounds(view) == []
    part, rate = work_shares(view)
    assert len(part) == len(rate) == 0
