"""Why a prompt was not found in a cache of several groups: the reasons, on the double.

A request goes on from resume points alone: its tokens may be cached, and nothing to go
on from.
"""

import logging

import pytest

from support.hybrid_double import EVERYTHING, LAYOUTS, HybridDouble
from support.hybrid_double import make_hybrid_scheduler as make
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.tree import Miss, encode
from vllm_radix.tree.resume import Dense, ResumeTree, State, Window
from vllm_radix.tree.resume.miss import EvictedPoints

STATES, WINDOWS = "full/16+mamba/16", "full/16+swa:40/16"
EXPLAIN = {"explain": True, "min_sub_block_tokens": 1}


def engine(layout, num_blocks=60, radix=EXPLAIN, **options):
    options = {"max_num_batched_tokens": 512, **options}
    return HybridDouble(
        make(RadixScheduler, layout, num_blocks, radix=radix, **options)
    )


def ask(one, name, tokens, max_tokens=1, **fields):
    """Run a request; return the reason, the token and the cached tokens."""
    one.add(name, tokens, max_tokens, **fields)
    one.run()
    request_id, miss, cached = one.scheduler.kv_cache_manager.miss_log.last
    assert request_id == name
    assert cached == one.cached[name]
    return miss.reason, miss.token, cached


@pytest.mark.parametrize("layout", [STATES, WINDOWS])
def test_reasons_that_one_group_has_as_well(layout):
    one = engine(layout)
    text = prompt("a", 100)
    assert ask(one, "new", text) == ("unseen", 0, 0)
    assert ask(one, "longer", text + prompt("b", 30)) == ("unseen", 100, 100)
    assert ask(one, "sibling", text + prompt("c", 30)) == ("diverged", 100, 100)
    assert ask(one, "all", [*text, 2]) == ("none", 100, 100)
    assert ask(one, "salted", text, cache_salt="x") == ("apart", 0, 0)
    for number in range(12):
        ask(one, f"fill {number}", prompt(number, 200))
    assert ask(one, "gone", [*text, 2]) == ("evicted", 0, 0)


def test_tokens_are_cached_and_no_state_there():
    one = engine(STATES)
    text = prompt("a", 400)
    ask(one, "new", text)
    assert ask(one, "first", text[:200] + prompt("b", 40)) == ("unkept", 0, 0)
    # That one came where the two part, and left a state there.
    assert ask(one, "next", text[:200] + prompt("c", 40)) == ("diverged", 200, 200)
    # A state behind so few tokens is not worth its block.
    assert ask(one, "few", [*text[:20], *prompt("d", 40)]) == ("diverged", 20, 0)


def test_tokens_are_cached_and_the_window_was_not_kept():
    one = engine(WINDOWS, prefix_cache_retention_interval=0)
    text = prompt("a", 400)
    ask(one, "new", text)
    assert ask(one, "first", text[:200] + prompt("b", 40)) == ("unkept", 0, 0)
    assert ask(one, "next", text[:200] + prompt("c", 40)) == ("diverged", 200, 200)


def test_what_is_not_worth_a_copy_is_unused():
    radix = {"explain": True, "min_sub_block_tokens": 20}
    one = engine(WINDOWS, radix=radix, prefix_cache_retention_interval=None)
    text = prompt("a", 100)
    ask(one, "new", text, 20)
    assert ask(one, "start", text[:74]) == ("unused", 64, 64)


@pytest.mark.parametrize("layout", [STATES, WINDOWS])
def test_what_another_request_is_computing_is_pending(layout):
    one = engine(
        layout,
        max_num_batched_tokens=160,
        long_prefill_token_threshold=32,
        radix={"hold": False, **EXPLAIN},
    )
    text = prompt("long", 300)
    one.add("first", text, 1)
    one.step()
    one.add("second", text[:250] + [2] * 20, 1)
    one.step()
    name, miss, cached = one.scheduler.kv_cache_manager.miss_log.last
    assert (name, miss.reason, cached) == ("second", "pending", miss.token)
    one.run()
    # Nobody computes it any more.
    one.add("third", text[:250] + [2] * 19 + [3, 3], 1)
    one.step()
    assert one.scheduler.kv_cache_manager.miss_log.last[1].reason != "pending"


def test_each_admission_is_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    one = engine(STATES)
    caplog.clear()
    text = prompt("a", 400)
    ask(one, "a", text)
    ask(one, "b", text[:200] + prompt("b", 40))
    first = "Request a: 0 of 400 tokens cached; nothing cached goes on from there "
    second = (
        "Request b: 0 of 240 tokens cached; what follows is cached, but no window or "
        "state to go on from was kept "
    )
    lines = dict.fromkeys(r.message for r in caplog.records if "cached;" in r.message)
    assert list(lines) == [f"{first}(from token 0 on)", f"{second}(from token 0 on)"]


@pytest.mark.parametrize("layout", [*LAYOUTS, EVERYTHING])
def test_random_traffic_is_explained_to_the_last_token(layout, monkeypatch):
    """What is counted as missed is what was computed, and a reason fits what is."""
    for lag in (0, 1):
        one = hybrid_traffic(layout, 3, RadixScheduler, lag, radix=EXPLAIN)
        log = one.scheduler.kv_cache_manager.miss_log
        assert not log._running, "a request that ended is said to compute"
        assert sum(log.missed_tokens.values()) > 500
        assert len(log.missed_tokens) >= 4, log.missed_tokens


# -- in the tree ---------------------------------------------------------------

PATH = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def tree():
    """A path of eight tokens with states after four, evicted at time 5, and eight."""
    tree = ResumeTree([Dense(2), State(4)])
    history = tree.remember_evictions()
    tables = [10, 11, 12, 13], [20, 21]
    for end in (4, 8):
        assert tree.add(encode(PATH), None, end, lambda g, i: tables[g][i])
    tree.release([10, 11, 12, 13, 20, 21])
    history.now = 5.0
    assert tree.evict(1) == [20]
    return tree


def test_a_state_that_was_given_up_is_told_from_one_that_never_was(tree):
    assert tree.explain(encode(PATH[:6])) == Miss("unkept", 0, 5.0)
    assert tree.explain(encode(PATH[:3])) == Miss("unkept", 0)
    assert tree.explain(encode([1, 2, 3, 9, 9])) == Miss("unkept", 0)
    assert tree.explain(encode([1, 2, 3, 9, 9]), least=4) == Miss("diverged", 3)
    assert tree.explain(encode([1, 2, 3, 9, 9]), grain=4) == Miss("diverged", 3)
    assert tree.explain(encode([*PATH, 9])) == Miss("unseen", 8)
    assert tree.explain(encode(PATH)) == Miss("none", 8)


def test_an_evicted_path_is_told_from_an_unseen_one(tree):
    tree.history.now = 7.0
    tree.evict(9)
    assert tree.explain(encode([*PATH, 9])) == Miss("evicted", 0, 7.0)
    assert tree.explain(encode(PATH[:6])) == Miss("evicted", 0, 5.0)
    assert tree.explain(encode([*PATH[:7], 9])) == Miss("evicted", 0, 5.0)
    assert tree.explain(encode([1, 2, 3, 9, 9])) == Miss("unseen", 0)
    assert tree.explain(encode(PATH), ("salt", "x")) == Miss("unseen", 0)
    tree.reset()
    assert tree.explain(encode([*PATH, 9])) == Miss("unseen", 0)


def test_what_is_kept_under_another_salt_is_apart(tree):
    assert tree.explain(encode(PATH), ("salt", "x")) == Miss("apart", 0)
    assert tree.explain(encode([1, 9]), ("salt", "x"), least=2) == Miss("unseen", 0)


def test_windows_are_explained_where_the_blocks_are_gone():
    tree = ResumeTree([Dense(2), Window(2, width=3)])
    tables = [10, 11, 12, 13], [20, 21, 22, 23]
    assert tree.add(encode(PATH), None, 8, lambda g, i: tables[g][i])
    assert tree.explain(encode([*PATH[:5], 9])) == Miss("unkept", 0)
    assert tree.explain(encode([*PATH[:7], 9])) == Miss("unkept", 0)
    assert tree.explain(encode([*PATH, 9])) == Miss("unseen", 8)


def test_the_history_of_points_is_bounded():
    history = EvictedPoints(capacity=3)
    for number in range(1, 10):
        history.now = float(number)
        history.note(encode(PATH[: number % 8 + 1]), None)
    assert [history.last(encode(PATH), None, 0, n) for n in (1, 2, 7, 8)] == [
        (1, 8.0),
        (2, 9.0),
        (2, 9.0),
        (8, 7.0),
    ]
    assert history.last(encode(PATH), None, 2, 7) is None
    assert history.last(encode(PATH), "other", 0, 8) is None
    assert len(history._times) == len(history._places) == 3
