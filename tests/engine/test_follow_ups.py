"""Which requests are recognized as the next turn of an answered one, on the double."""

import pytest

from support.engine_double import EngineDouble, make_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler

SIZE = 16


def answered(max_tokens=40, prompt_tokens=50, **options):
    """An engine that has answered one request, and what that request has cached."""
    options = {"num_blocks": 60, "max_num_seqs": 2, "block_size": SIZE} | options
    engine = EngineDouble(make_scheduler(RadixScheduler, **options))
    asked = prompt("asked", prompt_tokens)
    engine.add("first", asked, max_tokens=max_tokens)
    engine.run()
    return engine, asked, engine.outputs["first"]


def follow_ups_after(engine, *prompts):
    """Return how many follow-ups the engine counts when these prompts wait at once."""
    rate = engine.scheduler.admission._rate
    before = rate.num_follow_ups
    for at, tokens in enumerate(prompts):
        engine.add(f"next {at}", tokens)
    engine.step()
    return rate.num_follow_ups - before


def test_turns_that_go_on_from_an_answer_are_follow_ups():
    engine, asked, answer = answered()
    turns = [asked + answer + prompt(i, 30) for i in range(3)]
    assert follow_ups_after(engine, *turns) == 3


def test_requests_that_share_the_prompt_alone_are_none():
    engine, asked, _ = answered()
    others = [asked + prompt(i, 30) for i in range(2)]
    assert follow_ups_after(engine, *others, prompt("else", 60)) == 0


def test_an_answer_that_fills_no_block_has_no_follow_ups():
    engine, asked, answer = answered(max_tokens=4, prompt_tokens=3 * SIZE + 2)
    turns = [asked + answer + prompt(i, 30) for i in range(2)]
    assert follow_ups_after(engine, *turns) == 0


def test_a_prompt_that_leaves_the_answer_early_is_none():
    engine, asked, answer = answered()
    short = asked + answer[:-20] + prompt("else", 40)
    assert follow_ups_after(engine, short, prompt("other", 60)) == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_turns_after_an_abort_are_follow_ups_of_what_was_computed(lag):
    engine = EngineDouble(
        make_scheduler(RadixScheduler, num_blocks=60, block_size=SIZE), lag
    )
    asked = prompt("asked", 50)
    engine.add("first", asked, max_tokens=200)
    request = engine.scheduler.requests["first"]
    while request.num_output_tokens < 40:
        engine.step()
    engine.abort("first")
    answer = list(request.output_token_ids)
    turns = [asked + answer + prompt(i, 30) for i in range(2)]
    assert follow_ups_after(engine, *turns) == 2
