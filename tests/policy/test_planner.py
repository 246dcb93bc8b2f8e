"""One plan: who goes, why, and until when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import (
    SIZE,
    SmallQueue,
    common,
    nodes,
    plan,
    planner,
)

from vllm_radix.policy import ORDERS, StepCapacity

UNHURRIED = settings(deadline=None, max_examples=100)
TEXTS = st.lists(st.text("xyz", max_size=4), max_size=9)
WARM = st.lists(st.text("xyz", max_size=4), max_size=3)


def step(blocks, slots=100):
    return StepCapacity(slots, 10_000, blocks)


class Reference:
    """The rule of the default order, each quantity counted anew for each request.

    Without bounds, fairness or adapters.
    """

    def __init__(self, queue, capacity, unavailable=()):
        self.texts = queue.texts
        self.idle, self.taken = queue.idle(), set()
        self.needed = queue.needed()
        self.blocks = {a: entry.blocks for a, entry in queue.entries.items()}
        self.now_cached = {a: entry.cached for a, entry in queue.entries.items()}
        self.cached = dict(self.now_cached)
        self.left = [a for a in queue.entries if a not in unavailable]
        self.unplanned = list(queue.entries)
        self.free, self.slots = capacity.blocks, capacity.slots
        self.opened = 10**9

    def uncached(self, arrival):
        return self.blocks[arrival] - self.cached[arrival]

    def sharers(self, arrival):
        text = self.texts[arrival]
        return [
            other
            for other in self.unplanned
            if other != arrival and common(text, self.texts[other]) > self.cached[other]
        ]

    def oldest_fits(self, oldest):
        room = self.free - len(self.needed - self.taken)
        if self.uncached(oldest) > room:
            return False
        warm = [a for a in self.unplanned if self.cached[a]]
        others = len([a for a in warm if a != oldest])
        if not others or not self.sharers(oldest):
            return True
        kept = sum(map(self.uncached, warm)) * min(1.0, self.slots / others)
        return self.uncached(oldest) <= room - kept

    def make(self):
        picks, reasons = [], []
        while self.left and self.slots and self.free >= 0:
            oldest = self.left[0]
            entry = min(self.left, key=lambda a: (-self.cached[a], a))
            if entry == oldest or self.oldest_fits(oldest):
                entry, reason = oldest, "turn"
            else:
                reason = "group" if self.sharers(entry) else "prefix"
            path = nodes(self.texts[entry], self.now_cached[entry])
            idle = (path & self.idle) - self.taken
            self.free -= self.uncached(entry) + len(idle)
            if self.free < 0 and reason == "group":
                reason = "prefix"
            self.taken |= idle
            self.slots -= 1
            sharers = self.sharers(entry)
            if sharers:
                self.opened = min(self.opened, len(picks))
            self.left.remove(entry)
            self.unplanned.remove(entry)
            for other in sharers:
                self.cached[other] = common(self.texts[entry], self.texts[other])
            picks.append(entry)
            reasons.append(reason)
        return picks, reasons


def reference(queue, capacity, unavailable=()):
    return Reference(queue, capacity, unavailable).make()


CAPACITY = st.builds(step, st.integers(0, 30), st.integers(0, 9))


QUEUES = st.tuples(TEXTS, WARM, WARM, st.sets(st.integers(0, 8)))


def drawn(texts, warm, held, out):
    queue = SmallQueue(texts, [*warm, *held], held=held)
    return queue, [arrival for arrival in out if arrival < len(texts)]


@UNHURRIED
@given(QUEUES, CAPACITY)
def test_plan_any_queue_follows_the_rule_until_a_group_is_opened(made, capacity):
    queue, out = drawn(*made)
    expected = Reference(queue, capacity, out)
    arrivals, reasons = expected.make()
    end = min(expected.opened + 1, len(arrivals))
    found = plan("prefix", queue, capacity, unavailable=out)
    assert found[0][:end] == arrivals[:end]
    assert found[1][:end] == reasons[:end]
    if not expected.opened < len(arrivals):
        assert found == (arrivals, reasons)


@UNHURRIED
@given(QUEUES, CAPACITY)
def test_plan_any_queue_follows_the_rule(made, capacity):
    queue, out = drawn(*made)
    expected = reference(queue, capacity, out)
    assert plan("prefix", queue, capacity, unavailable=out) == expected


def test_plan_planned_member_is_not_one_that_others_wait_for():
    # 3 of 4 blocks go to the first; the second needs the one that is left.
    queue = SmallQueue(["xx", "x", "xx"])
    assert plan("prefix", queue, step(4, slots=2))[0] == [0, 1]


def test_plan_last_of_a_group_is_no_group():
    queue = SmallQueue(["a", "xx", "xyz", "xyy"], ["xx"])
    assert plan("lpm", queue)[1] == ["prefix", "group", "prefix", "turn"]


def test_plan_room_beside_needed_goes_in_order_of_arrival():
    queue = SmallQueue(["aa", "xxxa", "b", "xxxb"], ["xxx"])
    assert len(queue.needed()) == 3
    blocks = 3 + 3 + 2 + 2 + 2
    expected = ([0, 1, 2, 3], ["turn"] * 4)
    assert plan("prefix", queue, step(blocks)) == expected


def test_plan_no_room_beside_needed_longest_prefix_goes():
    queue = SmallQueue(["aa", "xya", "xxxa", "xxxb"], ["xxx", "xy"])
    needed = len(queue.needed())
    assert needed == 4
    arrivals, reasons = plan("prefix", queue, step(needed + 2, slots=1))
    assert (arrivals, reasons) == ([2], ["prefix"])
    assert plan("prefix", queue, step(needed + 3, slots=1))[0] == [0]


def test_plan_opener_of_a_group_leaves_room_for_warm_ones_that_can_go():
    # It takes 3 blocks, the warm ones 2 each.
    queue = SmallQueue(["aa", "xa", "xb", "xc", "ab"], ["x"])
    for slots, blocks in ((1, 3 + 2), (2, 3 + 4), (3, 3 + 6), (100, 3 + 6)):
        needed = len(queue.needed())
        assert plan("prefix", queue, step(needed + blocks, slots))[0][0] == 0
        assert plan("prefix", queue, step(needed + blocks - 1, slots))[0][0] == 1
    alone = SmallQueue(["aa", "xa", "xb", "xc", "b"], ["x"])
    assert plan("prefix", alone, step(1 + 3, slots=3))[0][0] == 0


@pytest.mark.parametrize("policy", ORDERS)
@settings(UNHURRIED, max_examples=30)
@given(texts=TEXTS, warm=WARM, blocks=st.integers(0, 20), tokens=st.integers(0, 40))
def test_plan_any_order_ends_at_the_first_that_does_not_fit(
    policy, texts, warm, blocks, tokens
):
    queue = SmallQueue(texts, warm)
    capacity = StepCapacity(7, tokens, blocks)
    arrivals, _ = plan(policy, queue, capacity)
    assert len(set(arrivals)) == len(arrivals) <= 7
    known, taken = queue.idle(), set()
    free, used = blocks, 0
    for arrival in arrivals:
        assert free >= 0 and used < tokens, "the one before was the last"
        path = nodes(texts[arrival])
        idle = (path & queue.idle()) - taken
        free -= len(path - known) + len(idle) + 1
        used += len(path - known) * SIZE + 1
        taken |= idle
        # In order of arrival it is not worth finding out what others share.
        known |= set() if policy == "fcfs" else path
    if len(arrivals) < min(7, len(texts)):
        assert free < 0 or used >= tokens, "there is room for another one"


def test_plan_older_small_request_is_not_behind_one_that_does_not_fit():
    # 16 usable blocks: 6 held by a running request, 8 idle of prompt A.
    prompt = "abcdefgh"
    queue = SmallQueue(["z", prompt + "yy"], [prompt])
    assert queue.entries[0].blocks == 2
    assert len(queue.needed()) == 8
    assert plan("prefix", queue, step(16 - 6)) == ([0, 1], ["turn", "turn"])


@pytest.mark.parametrize("policy", ["prefix", "lpm"])
@pytest.mark.parametrize("held", [0, 3, 8])
@pytest.mark.parametrize("beside", [-1, 0, 1, 2, 3])
def test_plan_idle_blocks_of_own_prefix_are_taken_once(policy, held, beside):
    # 8 blocks that two share, some of them held by others, and one for each.
    prompt = "abcdefgh"
    queue = SmallQueue([prompt, prompt, prompt], [prompt], held=[prompt[:held]])
    arrivals, _ = plan(policy, queue, step(8 - held + beside))
    # The last one does not fit.
    assert len(arrivals) == min(3, max(beside, 0) + 1)


def test_plan_group_shares_its_blocks_in_the_capacity():
    # 4 blocks for the first, 1 for each other; and 7 tokens, 1 and 1.
    texts = ["xxx", "xxx", "xxx", "aa"]
    assert plan("lpm", SmallQueue(texts), step(6))[0] == [0, 1, 2, 3]
    assert plan("lpm", SmallQueue(texts), step(5))[0] == [0, 1, 2]
    tokens = StepCapacity(9, 7 + 1 + 1, 99)
    assert plan("lpm", SmallQueue(texts), tokens)[0] == [0, 1, 2]


def test_plan_opener_is_followed_by_its_group():
    queue = SmallQueue(["a", "xx", "b", "xy", "xx", "c", "x"])
    arrivals, reasons = plan("lpm", queue, StepCapacity(6, 99, 99))
    assert arrivals == [0, 1, 4, 3, 6, 2]
    assert reasons[:2] == ["turn", "turn"]
    queue = SmallQueue(["a", "xx", "xyz", "xyy"], ["xx"])
    arrivals, reasons = plan("lpm", queue)
    assert arrivals == [1, 2, 3, 0]
    assert reasons[:2] == ["prefix", "group"]
    assert reasons[3] == "turn"


def test_plan_promises_are_forgotten_in_the_next_plan():
    made = planner("prefix")
    queue = SmallQueue(["aa", "xx", "b", "xxy"])
    for _ in range(3):
        picks = queue.plan(made, step(99))
        assert [pick.entry.arrival for pick in picks] == [0, 1, 2, 3]
    assert all(not entry.cached for entry in queue.entries.values())


def test_plan_computing_requests_are_never_planned_but_shared_with():
    queue = SmallQueue(["xyz", "a", "xy"])
    queue.entries[0].computing = True
    assert plan("prefix", queue)[0] == [1, 2]
    assert plan("lpm", queue)[0] == [1, 2]


@pytest.mark.parametrize("policy", [name for name in ORDERS if name != "prefix"])
def test_plan_published_orders_never_use_the_gate(policy):
    # There is room beside what is needed, and yet the best goes, if it is not fcfs.
    queue = SmallQueue(["aaaaa", "xxx"], ["xxx"], ages=[5, 5])
    capacity = StepCapacity(1, 10_000, 10_000, needed=3)
    expected = 0 if policy == "fcfs" else 1
    assert plan(policy, queue, capacity)[0] == [expected]
    assert plan("prefix", queue, capacity)[0] == [0]


@pytest.mark.parametrize(
    "policy", ["fcfs", "lpm", "shortest", "least-work-group", "hrrn"]
)
@settings(UNHURRIED, max_examples=40)
@given(
    made=st.lists(st.tuples(st.text("xyz", max_size=4), st.integers(0, 9)), max_size=9),
    warm=WARM,
    blocks=st.integers(0, 40),
)
def test_plan_published_order_each_is_the_first_of_a_new_ranking(
    policy, made, warm, blocks
):
    made.sort(key=lambda request: -request[1])
    texts, ages = [text for text, _ in made], [age for _, age in made]
    queue = SmallQueue(texts, warm, ages=ages)
    arrivals, _ = plan(policy, queue, step(blocks))
    view, _ = queue.view()
    at = {int(arrival): place for place, arrival in enumerate(view.arrival)}
    left = list(range(len(texts)))
    for arrival in arrivals:
        keys = ORDERS[policy]().scores(view)
        ranked = sorted(left, key=lambda n: ([float(k[at[n]]) for k in keys], n))
        assert arrival == ranked[0]
        left.remove(arrival)
        view.selectable[at[arrival]] = False
        for n, text in enumerate(texts):
            shared = common(text, texts[arrival])
            view.cached[at[n]] = max(view.cached[at[n]], shared)


def test_tokens_saved_prefix_evicted_before_its_turn_is_saved():
    texts = ["zzzzzzz", "xyz", "xyz"]
    # The older one takes 8 blocks; the last has one that uses the same before it.
    for pool, saved in ((7, 3 * SIZE), (8, 0)):
        queue = SmallQueue(texts, ["xyz"])
        picks = queue.plan(planner("lpm", pool=pool))
        assert [pick.entry.arrival for pick in picks] == [1, 2, 0]
        assert [pick.tokens_saved for pick in picks] == [saved, 0, 0]


def test_plan_max_adapters_passes_over_without_stopping_others():
    queue = SmallQueue(["a", "b", "c", "d", "e"], adapters=[1, 2, 0, 1, 3])
    for policy in ("prefix", "fcfs", "lpm"):
        capacity = StepCapacity(9, 999, 999, max_adapters=1)
        assert plan(policy, queue, capacity)[0] == [0, 2, 3]
        capacity = StepCapacity(9, 999, 999, adapters=frozenset({3}), max_adapters=1)
        assert plan(policy, queue, capacity)[0] == [2, 4]
        capacity = StepCapacity(9, 999, 999, adapters=frozenset({3}), max_adapters=2)
        assert plan(policy, queue, capacity)[0] == [0, 2, 3, 4]


def test_plan_max_adapters_longest_prefix_without_a_place_is_passed_over():
    queue = SmallQueue(["aaa", "xx", "x"], ["xx"], adapters=[0, 2, 0])
    capacity = StepCapacity(1, 999, 4, adapters=frozenset({1}), max_adapters=1)
    assert plan("prefix", queue, capacity)[0] == [2]
    assert plan("lpm", queue, capacity)[0] == [2]


@pytest.mark.parametrize("policy", ORDERS)
def test_plan_stands_back_are_not_planned(policy):
    queue = SmallQueue(["a", "xx", "xy", "b"], ["xx"])
    arrivals, _ = plan(policy, queue, stands_back=lambda entry: entry.arrival < 2)
    assert sorted(arrivals) == [2, 3]
    assert plan(policy, queue, stands_back=lambda entry: True)[0] == []
