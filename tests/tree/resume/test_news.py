"""What the log tells, and what pinned points need."""

from itertools import permutations

import pytest

from tree.resume.requests import Small
from vllm_radix.tree import ChangeLog, encode
from vllm_radix.tree.resume import Dense, State, Window


def logged(*components):
    small = Small(*components)
    small.tree.changes = ChangeLog()
    return small


def news(small):
    changes = small.tree.changes
    seen = changes.added_edges[:], changes.removed_blocks[:], changes.rescan_all
    changes.clear()
    return seen


def test_a_new_point_is_told_where_look_ups_ended_above_it():
    small = logged(Dense(2), State(2))
    one = [*range(10, 26)]
    table = small.table(one)
    first = small.add(one, table, 4)
    assert news(small) == ([(ChangeLog.root(None), encode(one[:4]))], [], False)
    second = small.add(one, table, 8)
    assert news(small) == ([(first.id, encode(one[4:8]))], [], False)
    # A point on a branch: told to those who ended at the point above the branch.
    small.add([*one[:10], 99])
    assert news(small) == ([(second.id, encode([*one[8:10], 99]))], [], False)


def test_a_point_is_told_when_it_is_written_and_not_before():
    small = logged(Dense(2))
    point = small.add([1, 2, 3], ready=False)
    assert news(small) == ([], [], False)
    assert small.find([1, 2, 3]) == (0, None)
    small.tree.make_ready(point)
    assert news(small)[0] == [(ChangeLog.root(None), encode([1, 2, 3]))]
    small.tree.make_ready(point)
    assert news(small) == ([], [], False), "once"


def test_a_point_that_goes_is_told_to_those_who_ended_there():
    small = logged(State(2))
    table = small.table([1, 2, 3, 4])
    above, point = (small.add([1, 2, 3, 4], table, place) for place in (2, 4))
    news(small)
    small.tree.remove(point)
    edges, removed, _ = news(small)
    assert removed == [point.id]
    assert edges == [(above.id, encode([3, 4]))]


def test_windows_are_told_to_places_near_the_point_only():
    small = logged(Dense(2), Window(2, width=3))
    assert not small.tree.tells_all
    one = [*range(40)]
    table = small.table(one)
    near, far = small.add(one, table, 8), small.add(one, table, 30)
    news(small)
    point = small.add(one, table, 6)
    assert near.id in news(small)[1]
    small.tree.remove(point)
    removed = news(small)[1]
    assert near.id in removed
    assert far.id not in removed


def test_a_reset_is_told():
    small = logged(State(2))
    small.tree.reset()
    assert news(small) == ([], [], True)


@pytest.mark.parametrize("components", [(Dense(2),), (Dense(2), State(2))])
def test_a_probe_names_the_point_and_the_last_one_on_the_path(components):
    small = Small(*components)
    one = [*range(16)]
    point = small.add(one, None, 8)
    probe = small.tree.probe(encode([*one[:12], 99]))
    assert probe == (8, point.id, (point.id, 8))
    probe = small.tree.probe(encode([*one[:5], 99]))
    if len(components) == 1:
        assert probe == (5, point.id, (None, 0)), "its path leads past the place"
    else:
        assert probe == (0, None, (None, 0))


def test_the_version_grows_with_what_could_be_found():
    small = Small(State(2))
    seen = [small.tree.version]
    point = small.add([1, 2])
    seen.append(small.tree.version)
    small.tree.remove(point)
    seen.append(small.tree.version)
    assert seen == sorted(set(seen))


# -- pins ----------------------------------------------------------------------


def test_what_pinned_points_need_is_counted_once():
    small = Small(Dense(2), State(4))
    one = [*range(8)]
    table = small.table(one)
    points = [small.add(one, table, place) for place in (4, 8)]
    branch = small.add([*one[:6], 50, 51])
    for point in (*points, branch):
        small.tree.pin(point.id)
    # 4 dense blocks and 2 states; one dense block more and one state.
    assert small.tree.num_pinned_idle == 8
    small.tree.acquire(table[0][:2])
    assert small.tree.num_pinned_idle == 6
    small.tree.unpin(branch.id)
    assert small.tree.num_pinned_idle == 4
    small.tree.release(table[0][:2])
    assert small.tree.num_pinned_idle == 6
    assert small.tree.pinned_blocks() == {point.id for point in points}
    small.tree.remove(points[1])
    assert small.tree.num_pinned_idle == 3


@pytest.mark.parametrize("order", permutations((3, 5, 8)), ids=str)
@pytest.mark.parametrize("branch", [False, True])
def test_a_block_kept_in_part_and_as_a_whole_is_counted_once(order, branch):
    small = Small(Dense(2), Dense(4), Window(2, width=3))
    one = [*range(8)]
    table = small.table(one)
    points = {place: small.add(one, table, place) for place in (3, 5, 8)}
    if branch:
        small.add([*one[:4], 50, 51])  # the edge is cut in two
    taken = {}
    counted, needed = 0, set()
    for place in order:
        found = small.tree.resume(points[place], place)
        needed |= {block for run in found.runs for block in run.blocks}
        counted += small.tree.idle_on_path(points[place].id, taken, take=True)
        assert counted == len(needed)
        small.tree.pin(points[place].id)
        assert small.tree.num_pinned_idle == len(needed)


def test_what_a_request_would_take_is_told_apart_from_what_is_taken():
    small = Small(Dense(2), State(4))
    one = [*range(8)]
    table = small.table(one)
    upper, lower = (small.add(one, table, place) for place in (4, 8))
    taken = {}
    assert small.tree.idle_on_path(upper.id, taken) == 3
    assert taken == {}
    assert small.tree.idle_on_path(upper.id, taken, take=True) == 3
    assert small.tree.idle_on_path(upper.id, taken) == 0
    assert small.tree.idle_on_path(lower.id, taken) == 3
    assert small.tree.idle_on_path(lower.id, {}) == 5
    assert small.tree.idle_on_path(10_000, taken) == 0
