"""The rankings, against sorting all requests anew each time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.small_queue import SmallQueue

from vllm_radix.policy import ORDERS, LongestPrefixHeap, ScoredRanking, WaitingRequest
from vllm_radix.policy.orders import LongestPrefix

UNHURRIED = settings(deadline=None, max_examples=60)


def request(arrival, cached=0, blocks=9):
    return WaitingRequest(str(arrival), arrival, blocks=blocks, cached=cached)


def anyone(entry):
    return True


def heap_of(*entries):
    heap = LongestPrefixHeap()
    for entry in entries:
        heap.push(entry)
    return heap


def test_heap_most_cached_is_best_and_ties_go_to_the_oldest():
    entries = [request(0, 1), request(3, 5), request(1, 5), request(2)]
    heap = heap_of(*entries)
    for arrival in (1, 3, 0):
        found = heap.best(anyone)
        assert found.arrival == arrival
        found.waits = False
    assert heap.best(anyone) is None, "one without a cached prefix is not in it"


def test_heap_stale_entries_are_dropped():
    one, two = request(0, 5), request(1, 3)
    heap = heap_of(one, two)
    one.cached = 2
    assert heap.best(anyone) is two
    assert len(heap._heap) == 1, "the news of it were not told"
    heap.push(one)
    two.waits = False
    assert heap.best(anyone) is one
    assert len(heap._heap) == 1


def test_heap_unusable_are_put_aside_and_kept():
    entries = [request(arrival, 9 - arrival) for arrival in range(5)]
    heap = heap_of(*entries)
    assert heap.best(lambda entry: entry.arrival >= 3) is entries[3]
    assert heap.best(anyone) is entries[0]
    assert heap.best(lambda entry: False) is None
    assert heap.best(lambda entry: entry.arrival == 4) is entries[4]


def test_heap_promise_counts_until_the_next_step():
    cold, warm = request(0), request(1, 3)
    heap = heap_of(warm)
    heap.promise(cold, 4)
    assert (heap.cached(cold), heap.cached(warm)) == (4, 3)
    assert heap.best(anyone) is cold
    heap.forget_promises()
    assert heap.cached(cold) == 0
    assert heap.best(anyone) is warm


def test_heap_promise_kept_counts_in_the_next_step():
    cold, warm = request(0), request(1, 3)
    heap = heap_of(warm)
    heap.promise(cold, 4)
    heap.forget_promises()
    cold.cached = 4
    heap.push(cold)
    assert heap.best(anyone) is cold


def test_heap_promise_not_kept_of_a_warm_one_loses_nothing():
    one, two = request(0, 2), request(1, 3)
    heap = heap_of(one, two)
    heap.promise(one, 7)
    assert heap.best(anyone) is one
    heap.forget_promises()
    assert heap.best(anyone) is two
    assert heap.best(lambda entry: entry is one) is one


def test_compact_mostly_stale_heap_is_rebuilt():
    entries = [request(arrival, 1) for arrival in range(10)]
    heap = heap_of()
    for cached in range(1, 9):
        for entry in entries:
            entry.cached = cached
            heap.push(entry)
    heap.compact(entries, len(entries))
    assert len(heap._heap) == 80, "no more than is allowed"
    for entry in entries:
        entry.cached = entry.arrival
        heap.push(entry)
    heap.compact(entries, len(entries))
    assert len(heap._heap) == 9, "one without a cached prefix is not in it"
    assert heap.best(anyone) is entries[9]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["promise", "plan", "out"]), st.integers(0, 99)),
    max_size=20,
)
QUEUE = st.lists(st.text("xy", max_size=5), min_size=1, max_size=9)
WARM = st.lists(st.text("xy", max_size=5), max_size=3)


def ranking_of(name, queue):
    order = ORDERS[name]()
    return ScoredRanking(order, queue.view()[0], queue.tree.entries())


def ranked_anew(name, ranking, out):
    """The best request by scores worked out anew."""
    view = ranking._view
    scores = ORDERS[name]().scores(view)
    entries = ranking._entries
    left = [
        at
        for at, entry in enumerate(entries)
        if view.selectable[at] and entry.arrival not in out
    ]
    keys = [*scores, view.arrival]
    if not left:
        return None
    return entries[min(left, key=lambda at: [float(key[at]) for key in keys])]


@pytest.mark.parametrize("name", [n for n in ORDERS if n != "window"])
@UNHURRIED
@given(texts=QUEUE, warm=WARM, operations=OPERATIONS)
def test_scored_ranking_any_promises_equals_ranking_anew(name, texts, warm, operations):
    queue = SmallQueue(texts, warm, ages=range(len(texts), 0, -1))
    ranking, out = ranking_of(name, queue), set()
    local = ORDERS[name].score_is_local

    def usable(entry):
        return entry.arrival not in out

    for operation, number in operations:
        entry = queue.entries[number % len(texts)]
        if operation == "promise":
            cached = ranking.cached(entry) + number % 2
            ranking.promise(entry, min(cached, len(texts[entry.arrival])))
        elif operation == "out":
            out.add(entry.arrival)
        else:
            best = ranking.best(usable)
            if best is not None:
                ranking.note_planned(best)
            if not local and best is not None:
                # What others share with one that is planned is promised anew.
                ranking.promise(best, ranking.cached(best))
        assert ranking.best(usable) is ranked_anew(name, ranking, out)


@UNHURRIED
@given(texts=QUEUE, warm=WARM, operations=OPERATIONS)
def test_scored_ranking_longest_prefix_agrees_with_heap(texts, warm, operations):
    queue = SmallQueue(texts, warm)
    view, _ = queue.view()
    scored = ScoredRanking(LongestPrefix(), view, queue.tree.entries())
    heap, out = queue.heap, set()

    def usable(entry):
        return entry.arrival not in out

    for operation, number in operations:
        entry = queue.entries[number % len(texts)]
        if operation == "promise":
            cached = min(heap.cached(entry) + number % 3, len(texts[entry.arrival]))
            if cached > heap.cached(entry):
                heap.promise(entry, cached)
                scored.promise(entry, cached)
        elif operation == "out":
            out.add(entry.arrival)
        else:
            best = scored.best(usable)
            if best is not None:
                out.add(best.arrival)
                scored.note_planned(best)
                heap.note_planned(best)
        for other in queue.entries.values():
            assert scored.cached(other) == heap.cached(other)
        best, warmest = scored.best(usable), heap.best(usable)
        if warmest is None:
            assert best is None or not scored.cached(best)
        else:
            assert best is warmest


@pytest.mark.parametrize("name", ["lpm", "shortest", "least-work-group", "dfs"])
def test_promise_makes_a_request_best(name):
    queue = SmallQueue(["a", "bbbb", "xyxy"], ["x"])
    ranking = ranking_of(name, queue)
    first = ranking.best(anyone)
    ranking.promise(queue.entries[1], 4)
    assert first is not queue.entries[1]
    assert ranking.best(anyone) is queue.entries[1]
    assert ranking.cached(queue.entries[1]) == 4


def test_cached_request_outside_the_ranking_is_its_own():
    queue = SmallQueue(["a"])
    assert ranking_of("lpm", queue).cached(request(7, 3)) == 3
