"""What somebody says of resume points: what goes first, and what stays."""

import pytest

from tree.resume.requests import Small
from tree.resume.test_eviction import order
from vllm_radix.tree import encode
from vllm_radix.tree.resume import Dense, State, Window

LAYOUTS = [(Dense(4), State(4)), (Dense(4), Window(4, width=6)), (Window(4, width=6),)]


@pytest.fixture(params=LAYOUTS, ids=str)
def small(request):
    small = Small(*request.param)
    yield small
    small.tree.check()


def admit(small, tokens):
    small.tree.note_parting(encode(tokens), None, len(tokens))


def path(small, tokens, *places):
    """Add points of one request; return their ids."""
    table = small.table(tokens)
    return [small.add(tokens, table, place).id for place in places]


SYSTEM = [7] * 16
ONE, TWO = [*SYSTEM, *[1] * 24], [*SYSTEM, *[2] * 24]


def test_what_an_ended_session_used_alone_goes_first(small):
    path(small, [9] * 4, 4)
    first, last = path(small, [1] * 400, 200, 400)
    assert small.tree.let_go(last) == [last, first]
    assert {*order(small)[:2]} == {first, last}


def test_levels_say_what_goes_sooner(small):
    ends = [path(small, [n] * (20 * n), 20 * n)[0] for n in (1, 2, 3)]
    for end, level in zip(ends, (3, 0, 1), strict=True):
        small.tree.let_go(end, level)
    assert order(small) == [ends[1], ends[2], ends[0]]


def test_where_paths_part_an_end_stops(small):
    shared, one = path(small, ONE, 16, 40)
    two = small.add(TWO).id
    assert small.tree.let_go(one) == [one]
    assert order(small)[0] == one
    assert two != shared


def test_what_another_path_has_used_stays_though_that_is_gone(small):
    shared, one = path(small, ONE, 16, 40)
    two = small.add(TWO)
    small.tree.remove(two)
    assert small.tree.let_go(one) == [one], "the edges are one again"
    assert small.tree._points[shared].turn == 0


def test_a_request_that_came_upon_a_part_of_a_path_has_used_it(small):
    shared, one = path(small, ONE, 16, 40)
    admit(small, TWO)
    assert small.tree.let_go(one) == [one]
    assert small.tree._points[shared].turn == 0


def test_a_request_that_goes_on_from_the_end_is_the_same_session(small):
    first, one = path(small, ONE, 16, 40)
    longer = [*ONE, *[5] * 12]
    admit(small, longer)
    (end,) = path(small, longer, 52)
    assert small.tree.let_go(one) == [], "another one goes on from there"
    assert small.tree.let_go(end) == [end, one, first]


def test_what_two_requests_hold_at_once_is_shared(small):
    _, one = path(small, ONE, 16, 40)
    small.tree.note_shared(encode(ONE), None, 20)
    assert small.tree.let_go(one) == [one]
    small.tree.note_shared(encode(ONE), None, 40)
    small.tree._move(small.tree._points[one], 0)
    assert small.tree.let_go(one) == []
    small.tree.note_shared(encode([3, 3]), None, 2)


def test_what_is_written_in_the_last_step_of_a_session_goes_once_it_is(small):
    table = small.table(ONE)
    first = small.add(ONE, table, 16, ready=False)
    one = small.add(ONE, table, 40)
    assert small.tree.let_go(one.id) == [one.id, first.id]
    assert first.protected
    small.tree.make_ready(first)
    small.add([5] * 4)
    assert {*order(small)[:2]} == {one.id, first.id}


@pytest.mark.parametrize("how", ["pinned", "junction"])
def test_an_end_stops_at_what_others_are_to_find(small, how):
    table = small.table(ONE)
    first = small.add(ONE, table, 16, shared=how == "junction")
    one = small.add(ONE, table, 40)
    if how == "pinned":
        small.tree.pin(first.id)
    assert small.tree.let_go(one.id) == [one.id]


def test_an_end_that_is_gone_lets_nothing_go(small):
    (one,) = path(small, ONE, 40)
    small.tree.remove(small.tree._points[one])
    assert small.tree.let_go(one) == []
    assert not small.tree.keep(one)
    assert small.tree.blocks_of(one) == []


def test_what_is_used_again_is_evicted_as_all_others(small):
    (weak,) = path(small, [9] * 4, 4)
    first, one = path(small, ONE, 16, 40)
    small.tree.let_go(one)
    admit(small, [*ONE[:30], 4])
    points = small.tree._points
    assert (points[first].turn, points[one].turn) == (0, -16)
    assert order(small)[0] == one
    first, one = path(small, ONE, 16, 40)
    small.tree.let_go(one)
    assert small.add(ONE) is None, "another one has computed it"
    assert small.tree._points[one].turn == 0
    assert weak != first


def test_what_is_kept_goes_after_others_by_level_and_before_what_is_pinned(small):
    ends = [path(small, [n] * 20, 20)[0] for n in range(1, 5)]
    small.tree.keep(ends[0], 4)
    small.tree.keep(ends[1], 1)
    small.tree.pin(ends[2])
    assert order(small) == [ends[3], ends[1], ends[0], ends[2]]


def test_a_kept_point_keeps_the_path_before_it(small):
    above, one = path(small, ONE, 16, 40)
    needed = {*small.tree.blocks_of(one)}
    small.tree.keep(one)
    small.add([5] * 80)
    while small.tree.num_points > 1:
        small.tree.evict(1)
    assert small.tree.num_cached == len(needed)
    assert all(block in small.tree for block in needed)
    assert above not in small.tree._points


def test_what_is_kept_no_more_has_the_place_it_would_have_had(small):
    ends = [path(small, [n] * (20 * n), 20 * n)[0] for n in range(1, 5)]
    plain = Small(*small.tree.components)
    theirs = [path(plain, [n] * (20 * n), 20 * n)[0] for n in range(1, 5)]
    for end in ends[:2]:
        small.tree.keep(end, 3)
    assert small.tree.evict(1)
    assert plain.tree.evict(1)
    for end in ends[:2]:
        small.tree.unkeep(end)
        small.tree.unkeep(end)
    assert small.tree.num_kept == 0
    rest = [end for end in theirs if end in plain.tree._points]
    left = [end for end in ends if end in small.tree._points]
    assert len(rest) == len(left) == 3
    assert order(small)[:1] == [left[0]]


def test_neither_hint_sets_the_clock(small):
    ends = [path(small, [n] * 40, 40)[0] for n in range(1, 4)]
    small.tree.let_go(ends[0])
    assert small.tree.evict(1)
    assert small.tree._evictor.clock == 0
    small.tree.keep(ends[1])
    assert small.tree.evict(1)
    clock = small.tree._evictor.clock
    assert clock > 0
    small.tree.evict(1)
    assert small.tree._evictor.clock == clock


def test_the_keeper_learns_of_all_that_is_kept_no_more(small):
    told = []
    small.tree.on_unkept = told.append
    ends = [path(small, [n] * 20, 20)[0] for n in range(1, 5)]
    for end in ends:
        assert small.tree.keep(end, 2)
    small.tree.unkeep(ends[0])
    small.tree.remove(small.tree._points[ends[1]])
    assert told == ends[:2]
    small.tree.let_go(ends[2])
    assert told == ends[:3]
    small.tree.evict(99)
    assert told == ends


def test_points_on_a_path_are_found(small):
    ids = path(small, ONE, 8, 16, 40)
    key = encode([*ONE[:20], 3])
    assert small.tree.points_on(key, None, 20) == ids[:2]
    assert small.tree.last_point(key, None, 21).id == ids[1]
    assert small.tree.last_point(key, None, 15).id == ids[0]
    assert small.tree.last_point(key, None, 7) is None
    found = small.find(ONE)[1]
    assert sorted(small.tree.blocks_of(ids[2])) == sorted(
        block for run in found for block in run
    )
