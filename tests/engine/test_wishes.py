"""What clients ask to be kept: the quota, who gives way, and that nothing is left."""

import random

import pytest

from vllm_radix.engine.wishes import Wishes
from vllm_radix.tree import RadixTree, encode

BLOCKS = 400


class Cache:
    """A tree of one-token blocks, all idle, and wishes of its paths."""

    def __init__(self, quota):
        self.tree = RadixTree(1)
        self.wishes = Wishes(self.tree, quota)
        self.blank = list(range(BLOCKS))

    def path(self, *symbols):
        key = encode(symbols)
        found = list(self.tree.match(key).blocks)
        self.tree.acquire(found)
        new = [self.blank.pop(0) for _ in symbols[len(found) :]]
        self.tree.insert(key, found + new, start=len(found))
        self.tree.release((found + new)[::-1])
        return found + new

    def check(self):
        self.tree.check()
        check_wishes(self.wishes, self.tree)


def check_wishes(wishes, tree):
    """See that the sums are those of the wishes that there are."""
    every = [w for here in wishes._wishes.values() for w in here.values()]
    assert len(every) == len(wishes) == len(wishes._ends)
    assert tree.num_kept == len(wishes._wishes)
    tenants = {w.tenant for w in every}
    assert tenants == set(wishes._accounts)
    charged = {t: {b for w in every if w.tenant == t for b in w.path} for t in tenants}
    for tenant, blocks in charged.items():
        assert wishes.charged_to(tenant) == len(blocks)
    assert wishes.charged == sum(map(len, charged.values())) <= wishes._quota
    assert wishes._listed == sum(len(w.path) for w in every) <= 8 * wishes._quota
    assert wishes._once == {w.end for w in every if w.once}


def test_a_wish_holds_until_its_time_and_leaves_nothing():
    cache = Cache(10)
    path = cache.path(1, 2, 3)
    other = cache.path(9)
    assert cache.wishes.add("a", path, 0, until=5.0, once=False)
    assert cache.wishes.charged == 3
    cache.wishes.expire(4.9)
    assert cache.tree.num_kept == 1
    cache.wishes.expire(5.0)
    cache.check()
    assert len(cache.wishes) == cache.tree.num_kept == cache.wishes.charged == 0
    assert not cache.wishes._accounts and not cache.wishes._wishes
    assert cache.tree.evict(4) == [*path[::-1], *other]


def test_blocks_are_charged_once_and_the_quota_is_kept():
    cache = Cache(5)
    first, second = cache.path(1, 2, 3), cache.path(1, 2, 4, 5)
    assert cache.wishes.add("a", first, 0, 5.0, False)
    assert cache.wishes.add("a", second, 0, 5.0, False)
    assert cache.wishes.charged == 5
    assert not cache.wishes.add("a", cache.path(7), 0, 6.0, False)
    cache.check()


def test_of_a_tenant_the_lowest_and_then_the_longest_wish_gives_way():
    cache = Cache(3)
    soon, late, high, now = (cache.path(n) for n in (1, 2, 3, 4))
    assert cache.wishes.add("a", soon, 0, 5.0, False)
    assert cache.wishes.add("a", late, 0, 50.0, False)
    assert cache.wishes.add("a", high, 5, 500.0, False)
    assert cache.wishes.add("a", now, 0, 1.0, False)
    kept = cache.tree._evictor.kept
    assert set(kept) == {*soon, *high, *now}
    cache.check()


def test_a_tenant_alone_has_the_quota_and_gives_way_to_another():
    cache = Cache(4)
    for symbol in range(6):
        cache.wishes.add("greedy", cache.path(symbol), 10, 9.0, False)
    assert cache.wishes.charged_to("greedy") == 4
    for symbol in range(10, 16):
        cache.wishes.add("other", cache.path(symbol), 0, 9.0, False)
    assert cache.wishes.charged_to("greedy") == cache.wishes.charged_to("other") == 2
    cache.check()


def test_a_wish_larger_than_the_quota_takes_nothing_from_others():
    cache = Cache(4)
    small = cache.path(1)
    cache.wishes.add("a", small, 0, 9.0, False)
    assert not cache.wishes.add("a", cache.path(*range(2, 8)), 10, 1.0, False)
    assert set(cache.tree._evictor.kept) == set(small)


def test_with_no_quota_nothing_is_kept():
    cache = Cache(0)
    assert not cache.wishes.add("a", cache.path(1), 0, 9.0, False)
    assert cache.tree.num_kept == 0


def test_a_wish_that_is_used_up_by_a_use_ends_with_it():
    cache = Cache(9)
    path, other = cache.path(1, 2), cache.path(3)
    cache.wishes.add("a", path, 0, 9.0, once=True)
    cache.wishes.add("a", other, 0, 9.0, once=False)
    cache.wishes.note_use(path[:1])
    assert len(cache.wishes) == 2, "its end was not reached"
    cache.wishes.note_use([*path, *other])
    assert set(cache.tree._evictor.kept) == set(other)
    cache.check()


def test_the_highest_wish_of_several_tenants_counts():
    cache = Cache(9)
    path, other = cache.path(1), cache.path(2)
    cache.wishes.add("a", path, 5, 5.0, False)
    cache.wishes.add("b", path, 1, 9.0, False)
    cache.wishes.add("b", other, 3, 9.0, False)
    cache.check()
    cache.wishes.expire(6.0)
    assert cache.tree.evict(2) == [*path, *other]


@pytest.mark.parametrize("seed", range(5))
def test_random_wishes_keep_the_account_and_end_with_nothing(seed):
    rng, cache = random.Random(seed), Cache(12)
    for now in range(300):
        symbols = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        action = rng.randrange(6)
        if action == 0:
            cache.blank += cache.tree.evict(rng.randrange(1, 6))
        elif action == 1:
            found = cache.tree.match(encode(symbols)).blocks
            cache.wishes.note_use(found)
            if found:
                cache.blank += cache.tree.evict(0)
                cache.tree.let_go(found[-1], len(found) - 1)
        elif action == 2:
            cache.wishes.expire(now)
        else:
            cache.wishes.add(
                rng.choice("abc"),
                cache.path(*symbols),
                rng.randrange(3),
                now + rng.randrange(1, 40),
                rng.random() < 0.3,
            )
        cache.check()
    cache.wishes.expire(1000)
    cache.check()
    assert not len(cache.wishes) and not cache.wishes._accounts
    assert not cache.wishes._listed and not cache.wishes._once


def test_a_wish_goes_over_to_a_block_that_is_computed_anew():
    cache = Cache(10)
    path = cache.path(1, 2, 3)
    for tenant in "ab":
        assert cache.wishes.add(tenant, path, 2, until=5.0, once=tenant == "a")
    new = [cache.blank.pop(0) for _ in path]
    cache.blank += cache.tree.insert(encode([1, 2, 3]), new)
    cache.check()
    assert cache.wishes._wishes.keys() == {new[-1]}
    cache.tree.release(new[::-1])
    other = cache.path(4, 5)
    assert cache.tree.evict(2) == other[::-1], "what is kept stays longer"
    cache.wishes.note_use(new)
    assert {w.tenant for w in cache.wishes._wishes[new[-1]].values()} == {"b"}
    cache.wishes.expire(5.0)
    cache.check()
    assert len(cache.wishes) == cache.tree.num_kept == 0


def test_a_wish_goes_over_to_a_duplicate_when_the_block_is_let_go():
    cache = Cache(10)
    path = cache.path(1, 2, 3)
    cache.tree.acquire(path)
    new = [cache.blank.pop(0) for _ in path]
    assert cache.tree.insert(encode([1, 2, 3]), new) == []
    assert cache.wishes.add("a", path, 0, until=5.0, once=False)
    assert sorted(cache.tree.release(path[::-1])) == path
    cache.check()
    assert cache.wishes._wishes.keys() == {new[-1]}


def test_what_ended_is_counted_by_why():
    cache = Cache(6)
    wishes = cache.wishes
    assert not wishes.add("a", list(range(7)), 0, until=5.0, once=False)
    one, two, three = cache.path(1, 2, 3), cache.path(4, 5, 6), cache.path(7, 8, 9)
    for path in (one, two):
        assert wishes.add("a", path, 0, until=5.0, once=path is two)
    assert not wishes.add("a", three, 0, until=5.0, once=False)
    assert wishes.num_active == 2
    wishes.add("a", one, 0, until=9.0, once=False)  # in place of its own
    wishes.add("b", one, 3, until=4.0, once=False)  # a has too much now
    wishes.note_use(two)
    wishes.expire(4.5)
    wishes.add("b", one, 0, until=9.0, once=False)
    cache.tree.discard(one[-1])
    wishes.add("b", two, 0, until=9.0, once=False)
    wishes.clear()
    once = dict.fromkeys(("quota", "used", "time", "gone", "reset"), 1)
    assert wishes.ended == {"refused": 2, **once}
