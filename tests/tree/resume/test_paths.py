"""Edges that are cut, joined and trimmed: what lies on them stays where it was."""

import pytest

from tree.resume.requests import Small
from vllm_radix.tree import encode
from vllm_radix.tree.resume import Chunk, Dense, State, Window


def layout(small):
    """What lies on each edge: its end, dense blocks, windows, idle ones, points."""
    return {
        edge.end: (
            [list(ids) for ids in edge.dense],
            [dict(blocks) for blocks in edge.windows],
            edge.num_idle,
            [point.num_tokens for point in edge.points],
        )
        for _, edge in small.tree._paths.edges()
    }


@pytest.mark.parametrize("at", range(1, 16))
def test_an_edge_is_cut_anywhere_and_joined_again(at):
    """The shorter part moves, whichever that is."""
    small = Small(Dense(2), Dense(4), Window(2, width=16))
    one = [*range(16)]
    table = small.table(one)
    small.add(one, table)
    before = layout(small)
    other = [*one[:at], 99]
    branch = small.add(other)
    edges = layout(small)
    assert [*sorted(edges)] == sorted({at, at + 1, 16})
    dense, windows, idle, points = edges[at]
    below = edges[16]
    assert dense == [table[0][: at // 2], table[1][: at // 4]]
    assert below[0] == [table[0][at // 2 :], table[1][at // 4 :]]
    assert windows[0] == {i: table[2][i] for i in range(at // 2)}
    assert below[1][0] == {i: table[2][i] for i in range(at // 2, 8)}
    assert (idle, below[2]) == (at // 2 + at // 4, 12 - at // 2 - at // 4)
    assert (points, below[3]) == ([], [16])
    small.tree.remove(branch)
    small.tree.check()
    assert layout(small) == before
    assert small.find(one) == (16, table)


def test_points_go_with_the_part_of_the_edge_that_they_lie_on():
    small = Small(Dense(2))
    one = [*range(16)]
    table = small.table(one)
    for place in (3, 8, 9, 16):
        small.add(one, table, place)
    branch = small.add([*range(8), 99])
    assert {end: e[3] for end, e in layout(small).items()} == {
        8: [3, 8],
        9: [9],
        16: [9, 16],
    }
    small.tree.remove(branch)
    assert {end: e[3] for end, e in layout(small).items()} == {16: [3, 8, 9, 16]}


def test_blocks_held_by_requests_are_not_counted_idle_after_a_cut():
    small = Small(Dense(2))
    one = [*range(12)]
    table = small.table(one)
    small.add(one, table)
    small.tree.acquire(table[0][:4])
    small.add([*range(6), 99])
    assert {end: e[2] for end, e in layout(small).items()} == {6: 0, 7: 0, 12: 2}
    small.tree.release(table[0][:4])
    assert {end: e[2] for end, e in layout(small).items()} == {6: 3, 7: 0, 12: 3}
    small.tree.check()


def test_what_leads_to_no_point_is_trimmed():
    small = Small(Dense(2), Window(2, width=4))
    one = [*range(12)]
    table = small.table(one)
    for place in (5, 12):
        point = small.add(one, table, place)
    freed = small.tree.remove(point)
    small.tree.check()
    # Block 2 of either group stays: the point before keeps it, half full.
    assert sorted(freed) == sorted(table[0][3:] + table[1][4:])
    assert small.find(one) == (5, [table[0][:3], table[1][1:3]])
    (end,) = layout(small)
    assert end == 5


def test_the_last_point_takes_the_namespace_along():
    small = Small(Dense(2))
    point = small.add([1, 2, 3], namespace="salt")
    assert small.find([1, 2, 3])[0] == 0
    assert small.find([1, 2, 3], namespace="salt")[0] == 3
    small.tree.remove(point)
    assert small.tree.stats() == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("at", range(4, 12))
def test_before_a_point_windows_are_put_together_from_others(at):
    """One group's windows of 4 tokens reach over the places of several points."""
    small = Small(Dense(2), Window(2, width=5))
    one = [*range(16)]
    table = small.table(one)
    for place in range(2, 17, 2):
        small.add(one, table, place)
    found, (dense, window) = small.find([*one[:at], 99])
    assert found == at
    assert dense == table[0][: -(-at // 2)]
    assert window == table[1][max(0, at - 4) // 2 : -(-at // 2)]


def test_windows_that_are_being_written_are_not_put_together():
    small = Small(Dense(2), Window(2, width=5))
    one = [*range(16)]
    table = small.table(one)
    small.add(one, table)
    other = small.table(one[:8])
    late = small.add([*one[:8], 50], [[*other[0], 90], [*other[1], 91]], ready=False)
    third = [*one[:8], 60]
    assert small.find(third)[0] == 0
    small.tree.make_ready(late)
    assert small.find(third) == (8, [table[0][:4], other[1][2:4]])


def test_the_point_at_a_place_comes_before_those_beyond_it():
    """It has all that is needed, and the news of its going are told there."""
    small = Small(Dense(2))
    one = [*range(8)]
    small.add(one)
    exact = small.add(one[:5])
    key = encode([*one[:5], 99])
    assert [p.num_tokens for p, _ in small.tree.places(key, None, 6)] == [5, 8]
    assert small.tree.probe(key).last_block == exact.id


def test_a_state_is_found_at_its_place_only():
    small = Small(Dense(2), State(4, grain=2))
    one = [*range(16)]
    table = small.table(one)
    assert small.add(one, table, 7) is None, "not of the grain"
    small.add(one, table, 6)
    small.add(one, table, 12)
    assert small.find([*one[:9], 99]) == (6, [table[0][:3], [table[1][1]]])
    assert small.find(one, limit=11)[0] == 6
    assert small.find(one, limit=12)[0] == 12


def test_there_is_one_point_at_a_place():
    small = Small(Chunk(2, chunk=4))
    point = small.add([1, 2, 3])
    assert small.add([1, 2, 3], shared=True) is None
    assert point.shared


def test_a_block_on_another_path_is_refused():
    small = Small(Dense(2))
    table = small.table([1, 2])
    small.add([1, 2], table)
    with pytest.raises(ValueError, match="block 1 is cached on another path"):
        small.add([3, 4], table)
    small.tree.check()


# -- costs ---------------------------------------------------------------------


def visited(small, tokens):
    before = small.tree._paths.visited
    small.tree.find(encode(tokens), None, len(tokens))
    return small.tree._paths.visited - before


def test_a_look_up_visits_the_edges_of_its_path_only():
    """However long they are, and however many others there are."""
    small = Small(Dense(16))
    stem = [1] * 4000
    small.add(stem)
    assert visited(small, stem) == 1
    for other in range(500):
        small.add([*stem[:2000], 2 + other])
    assert visited(small, stem) == 2
    small.add([*stem[:3000], 5])
    assert visited(small, stem) == 3
    assert visited(small, [9]) == 1


def test_a_point_that_depends_on_a_token_behind_it_is_found_with_that_alone():
    small = Small(State(1))
    tokens = [1, 2, 3, 4]
    point, _ = small.tree.add(
        encode(tokens), None, 3, lambda group, index: 7, ahead=encode([4])
    )
    for last, places in ((4, [3]), (5, [])):
        key = encode([1, 2, 3, last])
        assert [n for _, n in small.tree.places(key, None, 3)] == places
    # What is behind is not asked for: the token that is computed next is not known.
    assert [n for _, n in small.tree.places(encode([1, 2, 3]), None, 3)] == [3]
    small.tree.note_ahead(point, encode([5]))
    assert point.ahead == encode([4]), "it was known before"


def test_a_point_is_not_found_until_the_token_it_depends_on_is_known():
    small = Small(State(1))
    point, _ = small.tree.add(
        encode([1, 2, 3]), None, 3, lambda group, index: 7, ahead=None
    )
    key, version = encode([1, 2, 3, 4]), small.tree.version
    assert not list(small.tree.places(key, None, 3))
    small.tree.note_ahead(point, encode([4]))
    assert small.tree.version > version
    assert [n for _, n in small.tree.places(key, None, 3)] == [3]
