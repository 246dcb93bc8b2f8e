"""One plan: who is picked, why, and how far."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_radix.policy import ORDERS, Backlog, Bounds, Planner, Room, Turns, Waiting
from vllm_radix.policy import view_of as view_of_backlog
from vllm_radix.tree import BYTES_PER_TOKEN, encode

UNHURRIED = settings(deadline=None, max_examples=50)
SIZE = 2
FREE = Room(100, 10_000, 10_000)
LOOSE = Bounds(10**9, 1e9, 1e9)


class Guarded(ORDERS["lpm"]):
    """The guard, and no other bound."""

    guarded = True


def common(one, two):
    count = 0
    while one[: count + 1] == two[: count + 1] and count < min(len(one), len(two)):
        count += 1
    return count


def view_from(texts, warm=(), ages=None, pace=0.0):
    """In order of arrival; a letter is a block, and there is one block after them."""
    backlog = Backlog(SIZE * BYTES_PER_TOKEN)
    for arrival, text in enumerate(texts):
        key = encode([ord(letter) for letter in text for _ in range(SIZE)])
        work = -ages[arrival] if ages else 0
        tokens = len(text) * SIZE + 1
        entry = Waiting(text, arrival, work=work, key=key, tokens=tokens)
        entry.blocks = len(text) + 1
        entry.cached = max((common(text, other) for other in warm), default=0)
        backlog.add(entry)
    return view_of_backlog(backlog, 0, SIZE, pace)


def plan(policy, view, room=FREE, bounds=LOOSE, limit=0.0, turns=None, **options):
    """Return arrivals and reasons."""
    order = ORDERS[policy]() if isinstance(policy, str) else policy
    planner = Planner(order, bounds, options.pop("pool", 1000))
    planner.overtaking = options.pop("overtaking", 0)
    picks = planner.plan(view, room, turns or Turns(), 0.0, limit, **options)
    return [int(view.arrival[pick.place]) for pick in picks], picks


TEXTS = st.lists(st.text("xyz", max_size=4), max_size=9)
WARM = st.lists(st.text("xyz", max_size=4), max_size=3)


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(
    texts=TEXTS,
    warm=WARM,
    slots=st.integers(0, 9),
    tokens=st.integers(0, 40),
    d=st.data(),
)
def test_only_who_is_left_once_and_within_the_room(
    policy, texts, warm, slots, tokens, d
):
    blocks = d.draw(st.integers(0, 20))
    out = d.draw(st.sets(st.integers(0, max(0, len(texts) - 1))))
    barred = d.draw(st.sets(st.integers(0, max(0, len(texts) - 1))))
    view = view_from(texts, warm)
    places = set(range(len(texts)))
    for place in out & places:
        view.left[place] = False
    free = places - out - barred
    room = Room(slots, tokens, blocks)
    _, picks = plan(policy, view, room, Bounds(), barred=barred & places)
    picked = [pick.place for pick in picks]
    assert len(picked) == len(set(picked)) <= slots
    assert set(picked) <= free
    # What each costs, with all before it computed.
    costs, known = [], list(warm)
    by_place = {at: texts[int(view.arrival[at])] for at in places}
    for place in picked:
        text = by_place[place]
        cached = max((common(text, other) for other in known), default=0)
        costs.append((len(text) - cached) * SIZE + 1)
        known.append(text)
    spent = list(accumulate(costs, initial=0))
    assert all(before < tokens for before in spent[:-1])
    if len(picked) < min(slots, len(free)):
        assert spent[-1] >= tokens, "the room is used up"


@pytest.mark.parametrize("policy", ORDERS)
@UNHURRIED
@given(texts=TEXTS, warm=WARM)
def test_with_no_overtakes_all_go_in_order_of_arrival(policy, texts, warm):
    arrivals, picks = plan(policy, view_from(texts, warm), bounds=Bounds(0, 1e9, 1e9))
    assert arrivals == list(range(len(texts)))
    assert {pick.why for pick in picks} <= {"turn", "overtakes"}


@UNHURRIED
@given(TEXTS, WARM, st.floats(0, 99))
def test_without_patience_the_default_goes_in_order_of_arrival(texts, warm, limit):
    bounds = Bounds(10**9, 1e9, 0.0)
    view = view_from(texts, warm, pace=0.1)
    arrivals, picks = plan("prefix", view, bounds=bounds, limit=limit)
    assert arrivals == list(range(len(texts)))
    assert {pick.why for pick in picks} <= {"turn", "guard", "every"}


def test_the_guard_keeps_each_within_the_limit():
    view = view_from(["a", "b", "x"], ["x"], [99, 98, 97], pace=1.0)
    assert plan(Guarded(), view)[0] == [0, 1, 2]
    bounds = Bounds(10**9, 1e9, 1.0)
    for limit, first in ((1.0, 1), (0.9, 0)):
        view = view_from(["a", "x"], ["x"], pace=1)
        assert plan(Guarded(), view, bounds=bounds, limit=limit)[0][0] == first


@UNHURRIED
@given(
    st.lists(st.tuples(st.text("xy", max_size=3), st.integers(0, 20)), max_size=8),
    WARM,
    st.integers(1, 4),
    st.integers(0, 40),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_guard_lets_pass_while_all_can_wait(made, warm, pace, limit, patience):
    made.sort(key=lambda request: -request[1])
    texts, ages = [text for text, _ in made], [age for _, age in made]
    view = view_from(texts, warm, ages, float(pace))
    bounds = Bounds(10**9, 1e9, patience)
    arrivals, picks = plan(Guarded(), view, bounds=bounds, limit=float(limit))
    left, known = list(range(len(texts))), list(warm)

    def late(chosen):
        """Whether one older than it waits too long, all by age after it."""
        done = len(texts) - len(left)
        rest = [arrival for arrival in left if arrival != chosen]
        return any(
            ages[older] + (done + rank + 1) * pace > limit * patience
            for rank, older in enumerate(rest)
            if older < chosen
        )

    for arrival, pick in zip(arrivals, picks, strict=True):
        cached = {
            at: max((common(texts[at], other) for other in known), default=0)
            for at in left
        }
        wanted = min(left, key=lambda at: (-cached[at], at))
        assert arrival == (left[0] if late(wanted) else wanted)
        assert (pick.why == "guard") == (wanted != left[0] and late(wanted))
        left.remove(arrival)
        known.append(texts[arrival])


@pytest.mark.parametrize("policy", ["prefix", "k-lpm"])
@pytest.mark.parametrize("before", [0, 3, 7, 20])
def test_every_eighth_is_the_oldest(policy, before):
    texts = ["a", "b", *["x"] * 30]
    arrivals, picks = plan(policy, view_from(texts, ["x"]), overtaking=before)
    first = max(0, 7 - before)
    assert arrivals.index(0) == first
    assert arrivals.index(1) == first + 8
    assert [pick.why for pick in picks].count("every") == 2


def test_a_plan_alone_counts_for_nothing_until_it_is_carried_out():
    planner = Planner(ORDERS["prefix"](), LOOSE, 1000)
    for _ in range(9):
        view = view_from(["a", "x"], ["x"])
        picks = planner.plan(view, Room(1, 99, 99), Turns(), 0.0, 0.0)
        assert [int(view.arrival[pick.place]) for pick in picks] == [1]
    for _ in range(7):
        planner.admitted(oldest=False)
    view = view_from(["a", "x"], ["x"])
    picks = planner.plan(view, Room(1, 99, 99), Turns(), 0.0, 0.0)
    assert [int(view.arrival[pick.place]) for pick in picks] == [0]
    planner.admitted(oldest=True)
    assert planner.overtaking == 0


@pytest.mark.parametrize("policy", ORDERS)
def test_one_that_does_not_fit_stops_nobody_until_its_bound(policy):
    texts = ["abcdefgh", "xy", "xz", "x"]
    room = Room(3, 10_000, 7)
    arrivals, _ = plan(policy, view_from(texts), room)
    assert sorted(arrivals) == [1, 2, 3]
    turns = Turns()
    turns.depart(-5.0, 1, 0)
    arrivals, picks = plan(
        policy, view_from(texts), room, Bounds(1, 1e9, 1e9), 0, turns
    )
    assert (arrivals[0], picks[0].why) == (0, "overtakes")
    arrivals, picks = plan(
        policy, view_from(texts), room, Bounds(9, 4.9, 1e9), 0, turns
    )
    assert (arrivals[0], picks[0].why) == (0, "wait")
    arrivals, picks = plan(
        policy, view_from(texts), room, Bounds(9, 5.0, 1e9), 0, turns
    )
    assert arrivals[0] != 0


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "shortest", "horn", "hrrn"])
@UNHURRIED
@given(
    st.lists(st.tuples(st.text("xyz", max_size=4), st.integers(0, 9)), max_size=9),
    WARM,
    st.integers(0, 25),
)
def test_each_pick_is_the_first_of_a_new_ranking(policy, made, warm, blocks):
    made.sort(key=lambda request: -request[1])
    texts, ages = [text for text, _ in made], [age for _, age in made]
    room = Room(100, 10_000, blocks)
    arrivals, _ = plan(policy, view_from(texts, warm, ages), room)
    view = view_from(texts, warm, ages)
    at = {int(arrival): place for place, arrival in enumerate(view.arrival)}
    left = list(range(len(texts)))
    for arrival in arrivals:
        keys = ORDERS[policy]().scores(view)
        ranked = sorted(left, key=lambda n: ([float(k[at[n]]) for k in keys], n))
        needed = {n: int(view.blocks[at[n]] - view.cached[at[n]]) for n in left}
        fits = [n for n in ranked if needed[n] <= blocks]
        assert arrival == (fits or ranked)[0]
        blocks -= needed[arrival]
        left.remove(arrival)
        view.left[at[arrival]] = False
        for n, text in enumerate(texts):
            shared = common(text, texts[arrival])
            view.cached[at[n]] = max(view.cached[at[n]], shared)
        view.cached[at[arrival]] = view.blocks[at[arrival]]


def test_blocks_are_used_up_pick_by_pick():
    view = view_from(["aa", "bb", "c", "ddd"])
    assert plan("fcfs", view, Room(2, 99, 5))[0] == [0, 2], "3 of 5 blocks, then 2"


def test_who_opens_a_group_is_followed_by_its_mates():
    view = view_from(["a", "xx", "b", "xy", "xx", "c", "x"])
    arrivals, picks = plan("lpm", view, Room(6, 99, 99))
    assert arrivals == [0, 1, 4, 3, 6, 2]
    assert [pick.why for pick in picks[:2]] == ["turn", "turn"]
    view = view_from(["a", "xx", "xyz", "xyy"], ["xx"])
    arrivals, picks = plan("lpm", view)
    assert arrivals == [1, 2, 3, 0]
    assert [pick.why for pick in picks[:2]] == ["prefix", "group"]
    assert picks[3].why == "turn"


def test_who_follows_a_leader_opens_no_group():
    view = view_from(["a", "xx", "xyz", "xyy"], ["xx"])
    _, picks = plan("lpm", view)
    assert [pick.why for pick in picks] == ["prefix", "group", "prefix", "turn"]


def test_a_group_shares_its_blocks_in_the_room():
    # 4 blocks for the leader, 2 for each mate; the other needs 3.
    view = view_from(["xxx", "xxy", "xxz", "aa"])
    assert plan("lpm", view, Room(3, 99, 8))[0] == [0, 1, 2]
    view = view_from(["xxx", "xxy", "xxz", "aa"])
    assert plan("lpm", view, Room(9, 7 + 3 + 3, 99))[0] == [0, 1, 2]


def test_what_would_be_evicted_before_its_turn_is_saved():
    texts = ["zzzzzzz", "xyz", "xyz"]
    for pool, saved in ((7, 6), (8, 0)):
        view = view_from(texts, ["xyz"])
        arrivals, picks = plan("lpm", view, pool=pool)
        assert arrivals == [1, 2, 0]
        assert [pick.saved for pick in picks] == [saved, 6, 0]


def test_the_order_of_the_rest_is_kept():
    planner = Planner(ORDERS["lpm"](), Bounds(0), 1000)
    view = view_from(["a", "xy", "xyz"], ["xyz"])
    planner.plan(view, Room(1, 99, 99), Turns(), 0.0, 0.0)
    assert view.arrival[planner.ranked].tolist() == [2, 1], "0 is picked"


def test_an_older_one_waits_too_unless_it_is_computing():
    turns = Turns()
    turns.depart(0.0, 1, 0)
    # Either 0 departed, or one that overtook 0 and 1.
    for waits, expected in ((False, [2, 1]), (True, [1, 2])):
        view = view_from(["a", "b", "x"], ["x"])
        view.waits[0] = waits
        arrivals, _ = plan("lpm", view, bounds=Bounds(1), turns=turns, barred=[0])
        assert arrivals == expected
