"""Which requests go on from an answer where several groups do, on the double."""

import pytest

from support.hybrid_double import HybridDouble, make_hybrid_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler

LAYOUTS = pytest.mark.parametrize(
    "layout", ["full/16+mamba/16", "full/16+swa:40/16", "full/16+chunked:64/16"]
)
LAGS = pytest.mark.parametrize("lag", [0, 1])


def engine_of(layout, lag=0, num_blocks=400, **options):
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 512, **options}
    radix = {"min_sub_block_tokens": 1, **options.pop("radix", {})}
    scheduler = make_hybrid_scheduler(
        RadixScheduler, layout, num_blocks, bool(lag), radix=radix, **options
    )
    return HybridDouble(scheduler, lag)


def answered(layout, lag=0, max_tokens=40, **options):
    """An engine that has answered one request; its prompt and the answer."""
    engine = engine_of(layout, lag, **options)
    asked = prompt("asked", 50)
    engine.add("first", asked, max_tokens=max_tokens)
    engine.run()
    return engine, asked, engine.outputs["first"]


def follow_ups(engine):
    return engine.scheduler.admission._rate.num_follow_ups


def follow_ups_after(engine, *prompts):
    """Return how many follow-ups the engine counts when these prompts wait at once."""
    before = follow_ups(engine)
    for at, tokens in enumerate(prompts):
        engine.add(f"next {at}", tokens)
    engine.step()
    return follow_ups(engine) - before


@LAGS
@LAYOUTS
def test_turns_that_go_on_from_an_answer_are_follow_ups(layout, lag):
    engine, asked, answer = answered(layout, lag)
    turns = [asked + answer + prompt(i, 30) for i in range(3)]
    assert follow_ups_after(engine, *turns) == 3


@LAGS
@LAYOUTS
def test_requests_that_share_the_prompt_alone_are_none(layout, lag):
    engine, asked, answer = answered(layout, lag)
    others = [asked + prompt(i, 30) for i in range(2)]
    early = asked + answer[:5] + prompt("else", 40)
    assert follow_ups_after(engine, *others, early, prompt("else", 60)) == 0


@LAYOUTS
def test_an_answer_that_fills_no_block_has_none_where_hits_end_with_blocks(layout):
    engine, asked, answer = answered(layout, max_tokens=8, radix={"sub_block": False})
    assert follow_ups_after(engine, asked + answer + prompt("next", 30)) == 0


@LAYOUTS
def test_what_a_preempted_request_goes_on_from_ends_no_answer(layout):
    engine = engine_of(layout)
    asked = prompt("asked", 50)
    request = engine.add("first", asked, max_tokens=40)
    while request.num_output_tokens < 20:
        engine.step()
    text = list(request.all_token_ids)
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    assert follow_ups_after(engine, text + prompt("next", 30)) == 0
    assert "first" in engine.resumed
    engine.run()


@LAGS
@LAYOUTS
def test_turns_after_an_abort_are_follow_ups_of_what_was_computed(layout, lag):
    engine = engine_of(layout, lag)
    request = engine.add("first", prompt("asked", 50), max_tokens=200)
    while request.num_output_tokens < 40:
        engine.step()
    engine.abort("first")
    text = list(request.all_token_ids)
    turns = [text + prompt(i, 30) for i in range(2)]
    assert follow_ups_after(engine, *turns) == 2


@LAGS
@LAYOUTS
def test_in_a_closed_loop_each_turn_but_the_first_is_a_follow_up(layout, lag):
    """Six conversations over two slots: a turn comes when the one before is answered.

    One of them begins with the tokens of the first one's first turn.
    """
    engine = engine_of(layout, lag, num_blocks=1500)
    texts = {chat: prompt(chat, 40 + 3 * chat) for chat in range(5)}
    texts[5] = texts[0] + prompt(5, 20)
    turn = dict.fromkeys(texts, 0)

    def ask(chat):
        engine.add(f"{chat}.{turn[chat]}", texts[chat], max_tokens=20)

    for chat in texts:
        ask(chat)
    while engine.scheduler.has_requests() or engine.in_flight:
        engine.step()
        for chat, number in list(turn.items()):
            answer = engine.outputs.get(f"{chat}.{number}", ())
            if len(answer) == 20 and number < 3:
                turn[chat] += 1
                texts[chat] = texts[chat] + answer + prompt((chat, number), 25)
                ask(chat)
    assert set(turn.values()) == {3}
    assert follow_ups(engine) == 6 * 3


def test_a_point_that_is_evicted_is_forgotten_with_its_answer():
    engine, asked, answer = answered("full/16+mamba/16", num_blocks=40)
    for number in range(8):
        engine.add(f"other {number}", prompt(number, 200), max_tokens=1)
        engine.run()
    assert follow_ups_after(engine, asked + answer + prompt("next", 30)) == 0
