"""The order of waiting requests, as a pure function."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_radix.policy import Waiting, needs_order, prefix_order


def entries(*cached, overtaken=None):
    overtaken = overtaken or [0] * len(cached)
    return [
        Waiting(arrival=i, cached=c, total=20, overtaken=o)
        for i, (c, o) in enumerate(zip(cached, overtaken, strict=True))
    ]


def test_longest_prefix_first_then_arrival():
    assert prefix_order(entries(0, 3, 0, 9, 3), 99) == [3, 1, 4, 0, 2]


def test_a_bound_of_zero_is_arrival():
    assert prefix_order(entries(0, 3, 0, 9), 0) == [0, 1, 2, 3]


def test_whoever_is_past_the_bound_goes_first():
    waiting = entries(0, 3, 9, overtaken=[5, 1, 0])
    assert prefix_order(waiting, 5) == [0, 2, 1]


def test_no_gain_no_order():
    assert not needs_order(entries(0, 0), blank_blocks=0)  # nothing is cached
    assert not needs_order(entries(5, 0), blank_blocks=35)  # everything fits
    assert needs_order(entries(5, 0), blank_blocks=34)
    assert not needs_order([], blank_blocks=0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=12),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_every_prefix_of_the_order_keeps_the_bound(raw, bound, rng):
    # As in a queue: an older request was overtaken at least as often.
    counts = sorted((o for _, o in raw), reverse=True)
    waiting = [
        Waiting(arrival=i, cached=c, total=9, overtaken=min(o, bound))
        for i, ((c, _), o) in enumerate(zip(raw, counts, strict=True))
    ]
    shuffled = waiting[:]
    rng.shuffle(shuffled)
    order = prefix_order(shuffled, bound)
    assert sorted(order) == list(range(len(waiting)))
    for place, index in enumerate(order):
        entry = shuffled[index]
        passed = sum(shuffled[i].arrival > entry.arrival for i in order[:place])
        assert entry.overtaken + passed <= bound
