"""Hints through the scheduler: what goes first, what stays, and whom it may cost."""

import logging
import random

import pytest

from support.engine_double import EngineDouble, make_scheduler
from support.hinted_traffic import serve_with_random_hints
from vllm_radix.engine.hint_notes import MOST_ENDS
from vllm_radix.tree import encode

SIZE = 4


class Engine(EngineDouble):
    """An engine double with small blocks, and a clock that is set."""

    def __init__(self, blocks=40, **radix):
        scheduler = make_scheduler(block_size=SIZE, num_blocks=blocks + 1, radix=radix)
        super().__init__(scheduler)
        self.now = 0.0
        scheduler.clock = lambda: self.now
        self.pool = scheduler.kv_cache_manager.block_pool
        self.notes = self.pool.hint_notes

    def serve(self, name, prompt, salt=None, max_tokens=1, **hints):
        """Serve a request; return its prompt and answer."""
        extra = {f"radix_{hint}": value for hint, value in hints.items()}
        self.add(name, prompt, max_tokens, extra_args=extra, cache_salt=salt)
        self.run()
        return [*prompt, *self.outputs[name]]

    def left(self, tokens, salt=None):
        namespace = salt and ("salt", salt)
        return self.pool.tree.match(encode(tokens), namespace).num_blocks


def prompt(number, blocks=4):
    return [3 + (7 * number + at // SIZE) % 200 for at in range(blocks * SIZE)]


def fill(engine, first, count, blocks=4, salt=None):
    """Let others use the cache."""
    for number in range(first, first + count):
        engine.serve(f"other{number}", prompt(number, blocks), salt)


def test_an_ended_session_goes_before_what_is_older():
    engine = Engine(blocks=20)
    old = engine.serve("old", prompt(1))
    over = engine.serve("over", prompt(2), end_session=True)
    fill(engine, 10, 4)
    assert (engine.left(old), engine.left(over)) == (4, 0)
    plain = Engine(blocks=20)
    old = plain.serve("old", prompt(1))
    last = plain.serve("over", prompt(2))
    fill(plain, 10, 4)
    assert plain.left(old) == 0 and plain.left(last) > 0


def test_an_ended_session_takes_nothing_from_others():
    engine = Engine(blocks=20)
    system = prompt(1, 2)
    one = engine.serve("one", system + prompt(2, 2))
    engine.serve("two", system + prompt(3, 2), end_session=True)
    fill(engine, 10, 4)
    assert engine.left(one) == 4


def test_all_turns_of_an_ended_session_go_first():
    engine = Engine(blocks=24)
    old = engine.serve("old", prompt(1))
    first = engine.serve("a", prompt(2), max_tokens=SIZE)
    second = engine.serve("b", first + prompt(3, 1), end_session=True)
    fill(engine, 10, 5)
    assert engine.left(second) == 0 and engine.left(old) == 4


def test_an_aborted_request_may_end_its_session():
    engine = Engine(blocks=20)
    old = engine.serve("old", prompt(1))
    engine.add("over", prompt(2), 50, extra_args={"radix_end_session": 1})
    engine.step()
    engine.step()
    engine.abort("over")
    engine.run()
    fill(engine, 10, 4)
    assert engine.left(old) == 4 and engine.left(prompt(2)) == 0
    assert engine.notes.num_noted == 0


@pytest.mark.parametrize("hint", ["keep_for", "expect_in"])
def test_what_is_to_be_kept_stays_until_its_time(hint):
    engine = Engine(blocks=24)
    kept = engine.serve("kept", prompt(1), **{hint: 30})
    fill(engine, 10, 12)
    assert engine.left(kept) == 4
    engine.now = 46.0
    fill(engine, 30, 12)
    assert engine.left(kept) == 0
    assert engine.notes.num_noted == engine.pool.tree.num_kept == 0


def test_a_session_that_came_back_is_expected_no_more():
    engine = Engine(blocks=24)
    kept = engine.serve("a", prompt(1), expect_in=30)
    back = engine.serve("b", kept + prompt(2, 1))
    assert engine.notes.num_noted == 0
    fill(engine, 10, 12)
    assert engine.left(back) == 0


def test_a_priority_is_followed_within_the_quota():
    engine = Engine(blocks=40, hint_quota=0.2)
    low = engine.serve("low", prompt(1), priority="low")
    high = engine.serve("high", prompt(2), priority="high")
    more = engine.serve("more", prompt(3), priority=9)
    much = engine.serve("much", prompt(4), priority=5)
    assert engine.notes.wishes.charged == 8
    fill(engine, 10, 7)
    assert engine.left(low) == 0
    fill(engine, 20, 12)
    kept = [engine.left(one) for one in (high, more, much)]
    assert kept in ([4, 4, 0], [0, 4, 4])
    engine.now = 301.0
    fill(engine, 40, 12)
    assert engine.left(more) == engine.notes.num_noted == 0


def test_tenants_share_the_quota():
    engine = Engine(blocks=64, hint_quota=0.25)
    for number in range(8):
        engine.serve(f"g{number}", prompt(number), "greedy", keep_for=1000)
    assert engine.notes.wishes.charged_to("greedy") == 16
    mine = engine.serve("mine", prompt(30), "modest", keep_for=1000)
    fill(engine, 100, 40, salt="third")
    assert engine.left(mine, "modest") == 4
    assert engine.notes.wishes.charged_to("greedy") <= 12


def test_a_quota_of_nothing_keeps_nothing():
    engine = Engine(blocks=24, hint_quota=0)
    kept = engine.serve("kept", prompt(1), keep_for=1000)
    fill(engine, 10, 12)
    assert engine.left(kept) == engine.notes.num_noted == 0


def test_what_is_kept_goes_when_a_running_request_needs_its_room():
    engine = Engine(blocks=16, hint_quota=1)
    kept = engine.serve("kept", prompt(1), keep_for=1000)
    engine.serve("large", prompt(2, 15))
    assert engine.left(kept) < 4
    assert engine.notes.num_noted == 0


def test_the_branch_of_a_replaced_response_goes_first():
    engine = Engine(blocks=29)
    old = engine.serve("old", prompt(1))
    system = prompt(2, 2)
    draft = engine.serve("chatcmpl-x-0123abcd", system + prompt(3, 3), max_tokens=4)
    new = engine.serve("y", system + prompt(4, 3), replaces="chatcmpl-x")
    fill(engine, 10, 5)
    assert engine.left(old) == 4 and engine.left(new) == 5
    assert engine.left(draft) == 2


def test_nobody_replaces_what_another_tenant_has_asked():
    engine = Engine(blocks=28)
    theirs = engine.serve("x", prompt(1, 4), "one")
    engine.serve("old", prompt(5, 4), "two")
    engine.serve("y", prompt(3, 4), "two", replaces="x")
    engine.serve("z", prompt(4, 1), "two", replaces="no such response")
    assert engine.left(theirs, "one") == 4
    assert all(rank >= -1 for rank in engine.pool.tree._table.ranks)


def test_what_is_remembered_of_responses_is_bounded(monkeypatch):
    monkeypatch.setattr("vllm_radix.engine.hint_notes.MOST_ENDS", 5)
    engine = Engine(blocks=24)
    fill(engine, 10, 9)
    assert len(engine.notes._ends) == 5 < MOST_ENDS
    assert engine.scheduler.reset_prefix_cache()
    assert not engine.notes._ends


def test_a_wrong_hint_that_reaches_the_engine_is_ignored_with_a_word(caplog):
    engine = Engine()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.radix"):
        engine.serve("wrong", prompt(1), keep_for=-1)
    assert engine.notes.num_noted == 0
    assert "request wrong are ignored: radix_keep_for: -1 is not" in caplog.text


@pytest.mark.parametrize("eviction", ["lru", "hit-density"])
@pytest.mark.parametrize("seed", range(3))
def test_random_hints_change_no_answer(seed, eviction):
    rng = random.Random(seed)
    engine = Engine(blocks=24, eviction=eviction)
    plain = EngineDouble(make_scheduler(block_size=SIZE, num_blocks=200))

    def draw():
        text = prompt(rng.randrange(3), 2) + prompt(rng.randrange(9), rng.randint(0, 4))
        return text, rng.randint(1, 9)

    serve_with_random_hints(
        engine,
        plain,
        rng,
        draw,
        count=60,
        hinted=0.7,
        priorities=(0, 10),
        ids=60,
        steps=4,
    )
    engine.now += 1000
    engine.serve("last", prompt(50, 1))
    assert engine.notes.num_noted == engine.pool.tree.num_kept == 0


@pytest.mark.parametrize("name", ["a\nb", "\n", "-12345678", "0_", "x" * 100_000])
def test_any_id_of_a_client_is_served_and_long_ones_are_not_kept(name):
    engine = Engine()
    said = engine.serve(name, prompt(1))
    engine.serve("next", prompt(2), replaces=name)
    assert engine.left(said) >= 0
    kept = sum(len(text) for key in engine.notes._ends for text in key)
    assert kept < 1000


def test_another_tenant_s_ids_are_others():
    engine = Engine(blocks=200)
    mine = engine.serve("mine", prompt(1), salt="a")
    for number in range(30):
        engine.serve(f"{number}_mine", prompt(10 + number), salt="b")
    engine.serve("new", [*prompt(1, 1), *prompt(5, 2)], salt="a", replaces="mine")
    fill(engine, 100, 60)
    assert engine.left(mine, "a") <= 1, "it was to go first"
