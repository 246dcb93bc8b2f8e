"""Which resume point goes first, and what goes with it."""

import pytest

from tree.resume.requests import Small
from vllm_radix.tree.resume import Dense, State, Window


def order(small):
    """Evict until nothing idle is left; return the points' ids in that order."""
    gone = []
    alive = {*small.tree._points}
    while small.tree.num_idle:
        assert small.tree.evict(1)
        small.tree.check()
        left = {*small.tree._points}
        gone += sorted(alive - left)
        alive = left
    return gone


def test_a_superseded_point_goes_before_all_others():
    small = Small(Dense(4), State(4))
    one = [*range(40)]
    table = small.table(one)
    above, end = (small.add(one, table, place) for place in (20, 40))
    short = small.add([99] * 4)
    assert order(small) == [above.id, short.id, end.id]


@pytest.mark.parametrize("how", ["shared", "hit twice"])
def test_a_shared_point_counts_in_full(how):
    small = Small(Dense(4), State(4))
    one = [*range(40)]
    table = small.table(one)
    above = small.add(one, table, 20, shared=how == "shared")
    small.add(one, table, 40)
    short = small.add([99] * 4)
    if how != "shared":
        small.tree.note_hit(above.id)
        assert not above.shared, "the path that led here went on"
        small.tree.note_hit(above.id)
    assert above.shared
    assert order(small)[0] == short.id


def test_points_that_save_fewer_tokens_for_each_block_go_first():
    """All are leaves: 8 tokens in 2 and 3 blocks, 12 in 3, 40 in 10 and a state."""
    small = Small(Dense(4), State(4))
    long, short = small.add([1] * 40), small.add([2] * 8)
    middle = small.add([3] * 12)
    assert order(small) == [short.id, middle.id, long.id]


def test_a_new_point_is_worth_room_if_another_would_go_before_it():
    """The one to go next saves 8 tokens in 3 blocks."""
    small = Small(Dense(4), State(4))
    assert not small.tree.is_worth_room(100, 1), "nothing could go"
    long, short = small.add([1] * 40), small.add([2] * 8)
    for _ in range(2):
        assert small.tree.is_worth_room(6, 2)
        assert not small.tree.is_worth_room(5, 2)
    assert order(small) == [short.id, long.id]


def test_what_is_protected_makes_no_room():
    small = Small(State(4))
    small.tree.pin(small.add([1] * 8).id)
    assert not small.tree.is_worth_room(100, 1)


def test_what_was_used_since_others_went_stays_longer():
    """The clock shows the worth of what went last."""
    small = Small(State(4))
    first, second = small.add([1] * 8), small.add([2] * 8)
    small.add([3] * 4)
    small.tree.evict(1)
    small.tree.note_hit(first.id)
    assert order(small) == [second.id, first.id]


@pytest.mark.parametrize("how", ["pinned", "being written"])
def test_protected_points_go_last_of_all(how):
    small = Small(State(4))
    weak = small.add([1] * 4, ready=how == "pinned")
    strong = small.add([2] * 400)
    if how == "pinned":
        small.tree.pin(weak.id)
        small.tree.pin(weak.id)
        small.tree.unpin(weak.id)
    assert order(small) == [strong.id, weak.id]


@pytest.mark.parametrize("how", ["unpinned", "written"])
def test_protection_ends(how):
    small = Small(State(4))
    weak = small.add([1] * 4, ready=how == "unpinned")
    strong = small.add([2] * 400)
    small.tree.pin(weak.id)
    small.tree.make_ready(weak)
    small.tree.unpin(weak.id)
    assert order(small) == [weak.id, strong.id]


def test_held_blocks_stay_and_are_counted_again_when_they_are_let_go():
    small = Small(Dense(4), Window(4, width=4))
    held, idle = small.add([1] * 8, idle=False), small.add([2] * 40)
    assert small.tree.evict(1)
    assert not idle.alive
    assert small.tree.evict(1) == []
    assert held.alive
    small.tree.release([*held.blocks, *held.edge.dense[0]])
    assert len(small.tree.evict(1)) == 3


def test_idle_blocks_before_a_held_point_can_go():
    small = Small(Dense(4), State(4))
    one = [*range(8)]
    point = small.add(one)
    small.tree.acquire(point.blocks)
    assert sorted(small.tree.evict(1)) == [1, 2]
    assert not point.alive
    assert small.tree.num_idle == 0


def test_discarding_a_block_takes_what_lies_behind_it_along():
    small = Small(Dense(4), State(4))
    one = [*range(16)]
    table = small.table(one)
    places = [small.add(one, table, place) for place in (4, 8, 12, 16)]
    branch = small.add([*range(10), 99])
    freed = small.tree.discard(table[0][1])
    small.tree.check()
    assert [p.alive for p in (*places, branch)] == [True, *[False] * 4]
    assert {*table[0][1:], *table[1][1:]} <= {*freed}
    assert small.find(one)[0] == 4
    assert small.tree.discard(999) == []


def test_a_reset_forgets_everything():
    small = Small(Dense(4), State(4))
    point = small.add([1] * 8)
    small.tree.pin(point.id)
    version = small.tree.version
    small.tree.reset()
    small.tree.check()
    assert not point.alive
    assert small.tree.stats() == (0, 0, 0, 0, 0)
    assert small.tree.num_pinned_idle == 0
    assert small.tree.version > version
    assert small.tree.remove(point) == []
