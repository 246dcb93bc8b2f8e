"""Hints with several cache groups: what goes first, what stays, whom it may cost."""

import random

import pytest

from support.hinted_traffic import serve_with_random_hints
from support.hybrid_double import HybridDouble, make_hybrid_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler
from vllm_radix.engine.point_hint_notes import PointHintNotes
from vllm_radix.tree import encode

LAYOUTS = {
    "full/16+swa:48/16": 60,
    "full/32+mamba/32x2": 60,
    "swa:64/16x2+full/16": 90,
}
"""With the blocks of a pool that holds some five requests."""
LENGTH = 128


class Engine(HybridDouble):
    """A hybrid double with a clock that is set."""

    def __init__(self, layout, blocks=None, lag=0, check=True, **radix):
        scheduler = make_hybrid_scheduler(
            RadixScheduler,
            layout,
            (blocks or LAYOUTS[layout]) + 1,
            max_num_batched_tokens=256,
            radix=radix,
        )
        super().__init__(scheduler, lag, check)
        self.now = 0.0
        scheduler.clock = lambda: self.now
        self.pool = scheduler.kv_cache_manager.block_pool
        self.notes = self.pool.hint_notes

    def serve(self, name, tokens, salt=None, max_tokens=1, **hints):
        """Serve a request; return what is known of its path: not the last token."""
        extra = {f"radix_{hint}": value for hint, value in hints.items()}
        self.add(name, tokens, max_tokens, extra_args=extra, cache_salt=salt)
        self.run()
        return [*tokens, *self.outputs[name]][:-1]

    def left(self, tokens, salt=None):
        """Return how many tokens of a path are cached."""
        found = self.pool.tree.find(
            encode(tokens), salt and ("salt", salt), len(tokens)
        )
        return found.num_tokens if found else 0

    def fill(self, count, salt=None, first=100):
        """Let others use the cache."""
        for number in range(first, first + count):
            self.serve(f"other{number}", prompt(f"other{number}", LENGTH), salt)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def test_an_ended_session_goes_before_what_is_older_and_worth_less(layout):
    def left(**hints):
        engine = Engine(layout)
        old = engine.serve("old", prompt("old", LENGTH))
        over = engine.serve("over", prompt("over", 2 * LENGTH), **hints)
        while engine.left(old) and engine.left(over):
            engine.pool.tree.evict(1)
        return engine.left(old) > 0, engine.left(over) > 0

    assert left(end_session=True) == (True, False)
    assert left(priority="low") == (True, False)
    assert left() == (False, True)


def test_an_ended_session_takes_nothing_from_others(layout):
    engine = Engine(layout)
    system = prompt("system", 64)
    one = engine.serve("one", system + prompt("one", 64))
    assert isinstance(engine.notes, PointHintNotes)
    over = engine.serve("two", system + prompt("two", 64), end_session=True)
    while engine.left(over) > 64:
        assert engine.left(one) == LENGTH
        assert engine.pool.tree.evict(1)
    assert engine.left(one) == LENGTH


def test_all_turns_of_an_ended_session_go_first(layout):
    engine = Engine(layout)
    old = engine.serve("old", prompt("old", LENGTH))
    first = engine.serve("a", prompt("a", 64), max_tokens=9)
    second = engine.serve("b", first + prompt("b", 30), max_tokens=5)
    third = engine.serve("c", second + prompt("c", 30), end_session=True)
    while engine.left(third) or engine.left(second) or engine.left(first):
        assert engine.left(old) == LENGTH
        assert engine.pool.tree.evict(1)
    assert engine.left(old) == LENGTH


def test_an_aborted_request_may_end_its_session(layout):
    engine = Engine(layout)
    old = engine.serve("old", prompt("old", LENGTH))
    engine.add("over", prompt("over", 64), 50, extra_args={"radix_end_session": 1})
    engine.step()
    engine.step()
    engine.abort("over")
    engine.run()
    assert engine.left(prompt("over", 64)) > 0
    while engine.left(prompt("over", 64)):
        assert engine.pool.tree.evict(1)
    assert engine.left(old) == LENGTH


@pytest.mark.parametrize("hint", ["keep_for", "expect_in"])
def test_what_is_to_be_kept_stays_until_its_time(layout, hint):
    engine = Engine(layout, hint_quota=0.5)
    kept = engine.serve("kept", prompt("kept", LENGTH), **{hint: 30})
    engine.fill(9)
    assert engine.left(kept) == LENGTH
    engine.now = 46.0
    engine.fill(9, first=200)
    assert engine.left(kept) == 0
    assert engine.notes.num_noted == engine.pool.tree.num_kept == 0
    assert engine.notes.wishes.charged == 0


def test_a_session_that_came_back_is_expected_no_more(layout):
    engine = Engine(layout, hint_quota=0.5)
    kept = engine.serve("a", prompt("a", LENGTH), expect_in=30)
    assert engine.notes.num_noted == 1
    back = engine.serve("b", kept + prompt("b", 20))
    assert engine.cached["b"] > 64
    assert engine.notes.num_noted == 0
    engine.fill(9)
    assert engine.left(back) == 0


def test_the_branch_of_a_replaced_response_goes_first(layout):
    engine = Engine(layout)
    old = engine.serve("old", prompt("old", LENGTH))
    system = prompt("system", 64)
    draft = engine.serve("chatcmpl-x-0123abcd", system + prompt("draft", 64))
    new = engine.serve("y", system + prompt("new", 64), replaces="chatcmpl-x")
    while engine.left(draft) == LENGTH:
        assert engine.pool.tree.evict(1)
    assert engine.left(old) == engine.left(new) == LENGTH


def test_nobody_replaces_what_another_salt_has_asked(layout):
    engine = Engine(layout)
    engine.serve("x", prompt("x", LENGTH), "one")
    engine.serve("y", prompt("y", LENGTH), "two", replaces="x")
    engine.serve("z", prompt("z", LENGTH), "two", replaces="no such response")
    assert all(point.turn == 0 for point in engine.pool.tree._points.values())


def test_an_end_lets_go_of_nothing_public():
    public = prompt("system", 64)
    engine = Engine("full/16+swa:48/16", public_prefix={"prompts": [public]})
    engine.public = [public]
    hints = {"end_session": True}
    over = engine.serve("a", public + prompt("a", 64), "a", **hints)
    tree = engine.pool.tree
    gone = [point for point in tree._points.values() if point.turn < 0]
    assert gone
    assert all(point.num_tokens > 64 for point in gone)
    assert len(over) == LENGTH


def test_a_reset_forgets_what_was_asked(layout):
    engine = Engine(layout, hint_quota=0.5)
    engine.serve("kept", prompt("kept", LENGTH), keep_for=30)
    assert engine.notes.num_noted == 1
    assert engine.scheduler.reset_prefix_cache()
    assert engine.notes.num_noted == 0
    assert not engine.notes._ends
    engine.fill(9)


def test_tenants_share_the_quota_and_who_asks_for_too_much_pays(layout):
    """False hints cost their own tenant only: others are as well off as without."""

    def found(greedy):
        blocks = 3 * LAYOUTS[layout]
        engine = Engine(layout, blocks, check=False, hint_quota=0.3)
        hints = {"keep_for": 1000} if greedy else {}
        for number in range(12):
            tokens = prompt(f"g{number}", LENGTH)
            engine.serve(f"g{number}", tokens, "greedy", **hints)
        mine = engine.serve("mine", prompt("mine", LENGTH), "mine", keep_for=1000)
        engine.fill(24, "third")
        wishes = engine.notes.wishes
        quota = int(0.3 * engine.pool.num_gpu_blocks)
        assert wishes.charged <= quota
        assert wishes.charged_to("greedy") <= quota - wishes.charged_to("mine")
        return engine.left(mine, "mine")

    assert found(greedy=False) == found(greedy=True) == LENGTH


@pytest.mark.parametrize("lag", [0, 1])
def test_random_hints_change_no_answer_and_read_nothing_wrong(layout, lag):
    rng = random.Random(lag)
    engine = Engine(layout, hint_quota=0.5)
    plain = Engine(layout, blocks=400, check=False)

    def draw():
        text = prompt(f"s{rng.randrange(3)}", 40)
        text = text + prompt(f"o{rng.randrange(9)}", rng.randint(0, 90))
        return text, rng.randint(1, 40)

    serve_with_random_hints(
        engine,
        plain,
        rng,
        draw,
        count=24,
        hinted=0.8,
        priorities=(-10, 10),
        ids=30,
        steps=12,
    )
    assert sum(engine.cached.values()) > 0
    engine.now += 1000
    engine.serve("last", prompt("last", 20))
    assert engine.notes.num_noted == engine.pool.tree.num_kept == 0


def conversations(layout, seed, who, blocks):
    """Run conversations over a cache that is too small; return the honest hit rate.

    Every third conversation is of an honest tenant, the others of another one.

    Args:
        layout: of the cache.
        seed: of the traffic, and of false hints.
        who: says that sessions are over: nobody, all, or all and the others falsely.
        blocks: of the cache.
    """
    rng, lies = random.Random(seed), random.Random(seed)
    engine = Engine(layout, blocks, check=False, tenant="tenant")
    live, number, found, asked = [], 0, 0, 0
    for turn in range(120):
        while len(live) < 6:
            live.append([number, rng.randint(1, 5), prompt(f"c{number}", 48)])
            number += 1
        one = rng.choice(live)
        one[1] -= 1
        honest = one[0] % 3 == 0
        over = not one[1]
        tells = over and who != "nobody"
        if who == "others falsely" and not honest:
            tells = lies.random() < 0.8
        extra = {"tenant": str(honest)} | ({"radix_end_session": 1} if tells else {})
        engine.add(f"t{turn}", one[2], 2, extra_args=extra)
        engine.run()
        if honest:
            found += engine.cached[f"t{turn}"]
            asked += len(one[2])
        one[2] = [*one[2], *engine.outputs[f"t{turn}"], *prompt(f"t{turn}", 30)]
        if over:
            live.remove(one)
    return found / asked


def test_true_ends_find_more_and_false_ones_cost_their_own_tenant_only(layout):
    rates = {
        who: conversations(layout, 0, who, LAYOUTS[layout] * 3 // 5)
        for who in ("nobody", "all", "others falsely")
    }
    assert rates["all"] > rates["nobody"] + 0.05
    assert rates["others falsely"] >= rates["nobody"]
