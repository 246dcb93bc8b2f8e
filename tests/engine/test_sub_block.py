"""Hits that end inside a block, on the engine double: right reads, right counts."""

import random
from collections import defaultdict

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support.engine_double import EngineDouble, WrongReadError, make_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler
from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.tree import RadixTree


def engine(cls=RadixScheduler, lag=0, **options):
    options = {"num_blocks": 40, "max_num_seqs": 4, **options}
    return EngineDouble(make_scheduler(cls, asynchronous=bool(lag), **options), lag)


def serve(one, request_id, tokens, max_tokens=4, **fields):
    """Run one request to its end; return prompt and answer, as a next turn has it."""
    one.add(request_id, tokens, max_tokens, **fields)
    one.run()
    return tokens + one.outputs[request_id]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_conversation_goes_on_where_the_answer_ended(lag):
    """All but the last token of the answer, which nobody computed, is cached."""
    one = engine(lag=lag)
    said = serve(one, "turn 1", prompt("system", 40), max_tokens=7)
    serve(one, "turn 2", said + prompt("user", 10))
    assert one.cached["turn 2"] == 40 + 7 - 1
    assert not one.copied, "nobody else needs the old block"


def test_an_idle_block_is_taken_over_and_found_by_the_next():
    one = engine()
    serve(one, "a", prompt("a", 40), max_tokens=1)
    pool = one.scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks() - pool.num_blank_blocks
    one.add("b", prompt("a", 40) + prompt("b", 30), max_tokens=30)
    one.step()
    one.add("c", prompt("a", 40) + prompt("c", 30), max_tokens=30)
    one.step()
    assert one.cached == {"a": 0, "b": 40, "c": 40}
    assert one.copied == 1  # c's, from the block that b fills by now
    one.run()
    assert pool.tree.stats().idle_blocks >= before


def test_a_block_that_was_taken_over_is_cached_as_full_when_it_is():
    one = engine()
    said = serve(one, "a", prompt("a", 40), max_tokens=1)
    serve(one, "b", said + prompt("b", 60), max_tokens=1)
    stats = one.scheduler.kv_cache_manager.block_pool.tree.stats()
    assert (stats.cached_blocks, stats.partial_blocks) == (4, 1)
    serve(one, "c", said + prompt("b", 60), max_tokens=1)
    assert one.cached["c"] >= 96


def test_two_in_one_step_share_the_source_and_copy_it():
    """The first takes the block over, so the second must copy it in that step."""
    one = engine()
    serve(one, "a", prompt("a", 60), max_tokens=1)
    for name in "bc":
        one.add(name, prompt("a", 60) + prompt(name, 50), max_tokens=3)
    one.run()
    assert (one.cached["b"], one.cached["c"]) == (60, 60)
    assert one.copied == 1


def test_what_this_step_computes_is_not_copied_in_it():
    one = engine()
    for name in "abc":
        one.add(name, prompt("same", 60) + prompt(name, 30))
    one.run()
    # Whole blocks of the same step are shared, for they are written before read.
    assert one.cached == {"a": 0, "b": 32, "c": 32}
    assert not one.copied


@pytest.mark.parametrize("lag", [0, 1])
def test_a_running_request_is_found_in_its_last_block(lag):
    one = engine(lag=lag)
    one.add("a", prompt("a", 50), max_tokens=40)
    for _ in range(3):
        one.step()
    one.add("b", [*prompt("a", 50), 2, *prompt("b", 9)])
    one.run()
    assert one.cached["b"] == 50
    assert one.copied == 1


def test_a_branch_copies_what_it_shares_of_a_full_block():
    one = engine(radix={"min_sub_block_tokens": 1})
    serve(one, "a", prompt("a", 200))
    serve(one, "b", prompt("a", 150) + prompt("b", 50))
    assert one.cached["b"] == 150
    assert one.copied == 1
    serve(one, "a again", prompt("a", 200))
    assert one.cached["a again"] == 199, "the source is as it was"


@pytest.mark.parametrize(("least", "cached"), [(1, 133), (5, 133), (6, 128)])
def test_few_tokens_are_not_worth_a_copy(least, cached):
    one = engine(radix={"min_sub_block_tokens": least})
    serve(one, "a", prompt("a", 200))
    serve(one, "b", [*prompt("a", 133), 2, *prompt("b", 50)])
    assert one.cached["b"] == cached


def test_it_can_be_turned_off():
    one = engine(radix={"sub_block": False})
    said = serve(one, "a", prompt("a", 200))
    serve(one, "b", said)
    assert one.cached["b"] == 192
    assert not one.copied
    assert not one.scheduler.kv_cache_manager.block_pool.tree.stats().partial_blocks


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "mine"},
        {"lora_request": LoRARequest("adapter", 1, "/adapter")},
    ],
    ids=["salt", "adapter"],
)
def test_namespaces_share_no_part_of_a_block(fields):
    one = engine(radix={"min_sub_block_tokens": 1})
    serve(one, "a", prompt("a", 60), max_tokens=1)
    one.add("running", prompt("r", 60), max_tokens=20)
    one.step()
    one.add("b", prompt("a", 70), max_tokens=2, **fields)
    one.add("c", prompt("r", 70), max_tokens=2, **fields)
    one.run()
    assert (one.cached["b"], one.cached["c"]) == (0, 0)
    serve(one, "d", prompt("a", 70), **fields)
    assert one.cached["d"] == 69


def test_a_request_as_large_as_the_pool_is_not_held_up():
    """The block to copy and its copy would not fit beside each other."""
    one = engine(num_blocks=7)  # 6 blocks of 32
    serve(one, "a", prompt("a", 100), max_tokens=1)
    serve(one, "b", prompt("a", 90) + prompt("b", 90), max_tokens=4)
    assert one.cached["b"] == 64
    assert len(one.outputs["b"]) == 4


def test_a_preempted_request_resumes_where_it_was():
    one = engine(num_blocks=9, max_num_seqs=2, scheduler_reserve_full_isl=False)
    for name in "ab":
        one.add(name, prompt(name, 100), max_tokens=60)
    one.run()
    assert one.resumed, "the case has no preemption"
    assert [len(one.outputs[name]) for name in "ab"] == [60, 60]
    # Recomputed at most: what another took in the meantime.
    assert one.computed < 2 * 160 + 100


@pytest.mark.parametrize("lag", [0, 1])
def test_priorities_may_preempt_what_was_scheduled_in_the_same_step(lag):
    """What such a request published is not computed: nobody may find it."""
    one = engine(
        num_blocks=12,
        max_num_seqs=4,
        lag=lag,
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
    )
    rng = random.Random(1)
    for number in range(24):
        tokens = prompt(number % 3, rng.randrange(40, 120)) + prompt(number, 5)
        priority = rng.randrange(5)
        one.add(str(number), tokens, rng.randrange(1, 60), priority=priority)
        one.step()
    one.run()
    assert one.resumed
    assert len(one.outputs) == 24


@pytest.mark.parametrize("room", [36, 40, 60])
def test_tails_that_nobody_hits_displace_nothing(room):
    """8 prompts of 4 blocks, over and over, each with an end of its own."""
    cached = {}
    for sub_block in (False, True):
        one = engine(num_blocks=room, radix={"sub_block": sub_block})
        for number in range(40):
            tokens = prompt(number % 8, 128) + prompt(f"end {number}", 20)
            serve(one, str(number), tokens)
        cached[sub_block] = sum(one.cached.values())
    assert cached[True] == cached[False] == 32 * 128


def test_a_tail_that_was_hit_stays_like_any_block(monkeypatch):
    """Ten blocks: 2 of an old prompt, 3 of a, the end of b; then 6 are needed."""

    def cached():
        one = engine(num_blocks=11)
        serve(one, "old", prompt("old", 64), max_tokens=1)
        serve(one, "a", prompt("a", 90), max_tokens=1)
        serve(one, "b", [*prompt("a", 80), 2], max_tokens=1)  # copies 16 tokens
        serve(one, "other", prompt("other", 180), max_tokens=1)
        serve(one, "c", [*prompt("a", 80), 1], max_tokens=1)
        return one.cached["c"]

    assert cached() == 80
    monkeypatch.setattr(RadixTree, "note_hit", lambda *_: None)
    assert cached() == 64


def preempt_what_is_scheduled(cls=RadixScheduler):
    """An urgent request takes blocks from one scheduled before it in the same step.

    In the third step the patient one takes the last 3 of 13 blocks for 96 tokens,
    and the urgent one needs a third block for its token 65.
    """
    one = engine(
        cls,
        num_blocks=14,
        max_num_seqs=2,
        max_num_batched_tokens=160,
        long_prefill_token_threshold=96,
        scheduling_policy="priority",
        scheduler_reserve_full_isl=False,
    )
    one.add("patient", prompt("patient", 400), max_tokens=2, priority=1)
    one.step()
    one.add("urgent", prompt("urgent", 64), max_tokens=4, priority=0)
    one.run()
    assert [len(one.outputs[name]) for name in ("patient", "urgent")] == [2, 4]
    return one.resumed


def test_what_a_preempted_request_published_and_did_not_compute_is_gone(monkeypatch):
    assert preempt_what_is_scheduled() == ["patient"]
    with pytest.raises(WrongReadError):
        preempt_what_is_scheduled(Scheduler)  # a fault of vLLM 0.32's own
    monkeypatch.setattr(RadixBlockPool, "retract", lambda *_: None)
    with pytest.raises(WrongReadError):
        preempt_what_is_scheduled()


def longest_shared(tokens, seen):
    """Return the most tokens that a new prompt shares with one of the computed."""
    most = 0
    for other in seen:
        length = 0
        for mine, theirs in zip(tokens, other, strict=False):
            if mine != theirs:
                break
            length += 1
        most = max(most, length)
    return min(most, len(tokens) - 1)


def chat_turns(users=6, turns=4, seed=0):
    """One system prompt, users in turn; yields (user, new words)."""
    for turn in range(turns):
        for user in range(users):
            yield user, prompt((seed, user, turn), 20 + 7 * user)


def rollouts(tasks=4, leaves=5, seed=0):
    """Prompts of a task that branch late, at any token."""
    rng = random.Random(str(seed))
    for task in range(tasks):
        stem = prompt((seed, task), 230 + 17 * task)
        for leaf in range(leaves):
            cut = rng.randrange(len(stem) // 2, len(stem))
            yield stem[:cut] + prompt((seed, task, leaf), 40)


@pytest.mark.parametrize("size", [32, 128])
def test_chat_hits_what_an_oracle_of_tokens_predicts(size):
    """Room for everything: cached tokens are exactly the longest shared prefixes."""
    hits = {}
    for sub_block in (False, True):
        radix = {"sub_block": sub_block, "min_sub_block_tokens": 1}
        one = engine(block_size=size, num_blocks=200 * 128 // size, radix=radix)
        history, seen, predicted = defaultdict(lambda: prompt("system", 75)), [], 0
        for number, (user, words) in enumerate(chat_turns()):
            tokens = history[user] + words
            expected = longest_shared(tokens, seen)
            expected = expected if sub_block else expected // size * size
            said = serve(one, str(number), tokens, max_tokens=6)
            assert one.cached[str(number)] == expected
            predicted += expected
            seen.append(said[:-1])
            history[user] = said
        hits[sub_block] = predicted
    assert hits[True] > 1.05 * hits[False]


@pytest.mark.parametrize("size", [32, 128])
def test_rollouts_hit_what_an_oracle_of_tokens_predicts(size):
    hits = {}
    for sub_block in (False, True):
        radix = {"sub_block": sub_block, "min_sub_block_tokens": 1}
        one = engine(block_size=size, num_blocks=200 * 128 // size, radix=radix)
        seen, predicted = [], 0
        for number, tokens in enumerate(rollouts()):
            expected = longest_shared(tokens, seen)
            expected = expected if sub_block else expected // size * size
            said = serve(one, str(number), tokens, max_tokens=6)
            assert one.cached[str(number)] == expected
            predicted += expected
            seen.append(said[:-1])
        hits[sub_block] = predicted
    assert hits[True] > 1.05 * hits[False]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_random_conversations_read_right_and_answer_as_stock(size, lag):
    """Branches, turns and aborts under pressure, copies and take-overs included."""
    rng = random.Random(size)
    outputs, copied = [], 0
    for cls in (AsyncScheduler if lag else Scheduler, RadixScheduler):
        rng.seed(size)
        one = engine(
            cls, lag, block_size=size, num_blocks=900 // size + 2, max_num_seqs=4
        )
        known = [prompt(i, 150) for i in range(3)]
        for number in range(60):
            stem = rng.choice(known)
            tokens = stem[: rng.randrange(1, len(stem))] if number % 3 else stem
            tokens = (tokens + prompt(number, rng.randrange(1, 40)))[-300:]
            one.add(str(number), tokens, rng.randrange(1, 12))
            for _ in range(rng.randrange(3)):
                one.step()
            if number % 5 == 4:
                one.run()
                known.append(tokens + one.outputs[str(number)])
        one.run()
        outputs.append(one.outputs)
        copied = one.copied
    assert outputs[0] == outputs[1]
    assert copied if size > 8 else not copied
