"""Why a prompt was not found: the reasons, on the engine double and in the tree."""

import logging

import pytest

from support.engine_double import EngineDouble, make_scheduler
from support.prompts import prompt
from vllm_radix.tree import EvictionHistory, Miss, RadixTree, encode


def engine(**options):
    radix = {"explain": True, "min_sub_block_tokens": 1, **options.pop("radix", {})}
    return EngineDouble(make_scheduler(num_blocks=12, radix=radix, **options))


def ask(one, name, tokens, max_tokens=1, **fields):
    """Run a request; return the reason, the token and the cached tokens."""
    one.add(name, tokens, max_tokens, **fields)
    one.run()
    request_id, miss, cached = one.scheduler.kv_cache_manager.miss_log.last
    assert request_id == name
    assert cached == one.cached[name]
    return miss.reason, miss.token


def test_the_reasons_of_finished_requests():
    one = engine()
    text = prompt("a", 100)
    assert ask(one, "new", text) == ("unseen", 0)
    assert ask(one, "again", text) == ("none", 99)
    assert ask(one, "longer", text + prompt("b", 30)) == ("unseen", 100)
    assert ask(one, "other way", text[:70] + [2] * 30) == ("diverged", 70)
    assert ask(one, "salted", text, cache_salt="x") == ("apart", 0)
    assert ask(one, "few", [*text[:69], 60, 61]) == ("diverged", 69)
    for number in range(3):
        ask(one, f"fill {number}", prompt(number, 340))
    assert ask(one, "gone", text) == ("evicted", 0)
    counts = one.scheduler.kv_cache_manager.miss_log.missed_tokens
    assert counts["evicted"] == 99
    assert counts["apart"] == 99
    assert counts["diverged"] >= 29


def test_what_another_request_is_computing_is_pending():
    one = engine(
        max_num_batched_tokens=160,
        long_prefill_token_threshold=32,
        radix={"hold": False},
    )
    text = prompt("long", 300)
    one.add("first", text, 1)
    one.step()
    one.add("second", text[:250] + [2] * 20, 1)
    one.step()
    name, miss, cached = one.scheduler.kv_cache_manager.miss_log.last
    assert (name, miss.reason, cached) == ("second", "pending", miss.token)
    one.run()


def test_what_is_not_worth_a_copy_is_unused():
    one = engine(radix={"min_sub_block_tokens": 20})
    text = prompt("a", 100)
    ask(one, "new", text, 20)
    assert ask(one, "start", text[:74]) == ("unused", 64)


def test_each_admission_is_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    one = engine()
    caplog.clear()
    ask(one, "a", prompt("a", 50))
    ask(one, "b", prompt("a", 50))
    first = "Request a: 0 of 50 tokens cached; nothing cached goes on from there "
    second = "Request b: 49 of 50 tokens cached; that is all there can be "
    lines = dict.fromkeys(r.message for r in caplog.records if "cached;" in r.message)
    assert list(lines) == [f"{first}(from token 0 on)", f"{second}(from token 49 on)"]


def test_it_is_off_by_default():
    one = EngineDouble(make_scheduler())
    assert one.scheduler.kv_cache_manager.miss_log is None
    assert one.scheduler.kv_cache_manager.block_pool.tree.history is None


@pytest.fixture
def tree():
    """Two blocks, both evicted again at time 5."""
    tree = RadixTree(2)
    tree.history = EvictionHistory(capacity=2)
    tree.history.now = 5.0
    tree.insert(encode([1, 2, 3, 4, 5, 6]), [0, 1, 2])
    tree.release([2, 1])
    tree.evict(2)
    return tree


def test_eviction_is_told_from_divergence(tree):
    assert tree.explain(encode([1, 2, 3, 4])) == Miss("evicted", 2, 5.0)
    assert tree.explain(encode([1, 2, 9, 9])) == Miss("unseen", 2)
    tree.insert(encode([1, 2, 7, 8]), [0, 3], start=1)
    assert tree.explain(encode([1, 2, 3, 4])) == Miss("evicted", 2, 5.0)
    assert tree.explain(encode([1, 2, 9, 9])) == Miss("diverged", 2)
    assert tree.explain(encode([1, 2, 7, 9])) == Miss("diverged", 3)


def test_what_followed_a_block_is_forgotten_with_it(tree):
    tree.release([0])
    tree.evict(1)
    assert tree.explain(encode([1, 2, 3, 4])) == Miss("evicted", 0, 5.0)
    tree.insert(encode([9, 9]), [0])  # the same id, elsewhere
    assert tree.explain(encode([9, 9, 3, 4])) == Miss("unseen", 2)


def test_the_history_is_bounded():
    history = EvictionHistory(capacity=3)
    for parent in range(10):
        history.note(parent, b"x")
    known = [p for p in range(10) if history.evicted_at(p, b"x") is not None]
    assert known == [7, 8, 9]
    for tokens in range(30):
        history.note(7, bytes([tokens]))
    assert len(history._after[7]) == 16
