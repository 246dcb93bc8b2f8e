"""Drafts beside states: guesses leave states side by side, and one of them is right.

Of n-grams, which keep nothing; and of EAGLE or MTP, whose layers' KV depends on the
token behind it as well.
"""

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support.engine_double import WrongReadError
from support.hybrid_double import (
    HybridDouble,
    make_hybrid_scheduler,
    ngram_drafts,
    not_copying,
    take_ngrams_for_eagle,
)
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine import hybrid_manager
from vllm_radix.engine.state_points import StatePoints
from vllm_radix.tree.resume import ResumePoint
from vllm_radix_bench.sim.engine import RequestMaker

LAYOUTS = {
    "full/64+mamba/64x2+full/64": [3],
    "full/64+swa:40/64+mamba/64+swa:33/64": [3],
    "full/16+mamba/64x2+full/16": [3],
}
"""Layouts, and the groups that are a draft model's, where it has any."""
LAGS = [0, 1]
DRAFTS = 3
EXACT = {"min_sub_block_tokens": 1}


@pytest.fixture(params=["n-gram", "EAGLE"])
def method(request, monkeypatch):
    """What drafts are made by."""
    if request.param == "EAGLE":
        take_ngrams_for_eagle(monkeypatch)
    return request.param


@pytest.fixture
def eagle(monkeypatch):
    take_ngrams_for_eagle(monkeypatch)


def traffic(layout, seed, cls, lag, method, **options):
    # What stock's drafters read is not judged here: its tokens are counted.
    own = method == "EAGLE" and cls is RadixScheduler
    if cls is RadixScheduler:
        options["radix"] = EXACT
    return hybrid_traffic(
        layout,
        seed,
        cls,
        lag,
        drafts=DRAFTS,
        drafters=LAYOUTS[layout] if own else (),
        **options,
    )


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_traffic_reads_right(layout, lag, method):
    engines = [traffic(layout, seed, RadixScheduler, lag, method) for seed in range(4)]
    assert all(engine.accepted > 20 for engine in engines)
    assert sum(len(engine.resumed) for engine in engines) > 0


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_room_it_reads_right_and_finds_more_than_stock(layout, lag, method):
    stock, radix = (
        [traffic(layout, seed, cls, lag, method, room=60) for seed in range(20, 26)]
        for cls in (AsyncScheduler if lag else Scheduler, RadixScheduler)
    )
    found = [sum(sum(e.cached.values()) for e in some) for some in (radix, stock)]
    assert found[0] > found[1], found
    assert sum(engine.copied for engine in radix) > 0
    inside = [n for e in radix for n in e.cached.values() if n % 64]
    assert len(inside) > 5


def engine_of(cls, lag=0, layout="full/64+mamba/64x2+full/64", blocks=200, **options):
    options |= {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    if cls is RadixScheduler:
        options["radix"] = EXACT
    options["speculative_config"] = ngram_drafts(DRAFTS, lag)
    scheduler = make_hybrid_scheduler(cls, layout, blocks, bool(lag), **options)
    return HybridDouble(scheduler, lag, drafts=DRAFTS)


def cached(engine, **prompts):
    """Serve prompts one after the other; return what each one found cached."""
    for name, tokens in prompts.items():
        engine.add(name, tokens, 10)
        engine.run()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return [engine.cached[name] for name in prompts]


@pytest.mark.parametrize("lag", LAGS)
def test_a_conversation_goes_on_where_its_prompt_ended(lag, method):
    engine = engine_of(RadixScheduler, lag)
    engine.drafters = [3] if method == "EAGLE" else []
    first = prompt("first", 165)
    cached(engine, first=first)
    turn = [*first, *engine.outputs["first"], *prompt("more", 9)]
    # A prompt sent again ends where a step of stock's would.
    whole = 64 if method == "EAGLE" else 128
    assert cached(engine, turn=turn, again=first) == [165, whole]
    stock = engine_of(AsyncScheduler if lag else Scheduler, lag)
    assert cached(stock, first=first, turn=turn, again=first)[1:] == [whole, whole]


@pytest.mark.parametrize("lag", LAGS)
def test_others_go_on_where_they_part(lag, method):
    """One token before that, where what is kept depends on the next token."""
    engine = engine_of(RadixScheduler, lag)
    engine.drafters = [3] if method == "EAGLE" else []
    shared = prompt("shared", 110)
    engine.add("a", [*shared, *prompt("a", 80)], 10)
    engine.add("b", [*shared, *prompt("b", 80)], 10)
    engine.run()
    (found,) = cached(engine, c=[*shared, *prompt("c", 80)])
    place = 109 if method == "EAGLE" else 110
    assert [engine.cached[name] for name in "ab"] == [0, place]
    assert found == place


def test_an_answer_that_was_said_otherwise_is_not_gone_on_from(eagle):
    """What EAGLE keeps of the prompt's last token was made with the first answer."""
    engine = engine_of(RadixScheduler)
    engine.drafters = [3]
    first = prompt("first", 165)
    cached(engine, first=first)
    said = engine.outputs["first"][0]
    other = [*first, said + 1, *prompt("more", 9)]
    same = [*first, said, *prompt("less", 9)]
    assert cached(engine, other=other, same=same) == [64, 165]


@pytest.mark.parametrize("lag", LAGS)
def test_with_an_interval_answers_leave_points_where_stock_keeps_states(lag, method):
    found = {}
    for cls in (AsyncScheduler if lag else Scheduler, RadixScheduler):
        engine = engine_of(cls, lag, prefix_cache_retention_interval=64)
        own = method == "EAGLE" and cls is RadixScheduler
        engine.drafters = [3] if own else []
        first = prompt("first", 100)
        engine.add("first", first, 130)
        engine.run()
        turn = [*first, *engine.outputs["first"], *prompt("more", 9)]
        found[cls] = cached(engine, turn=turn)[0]
    stock, radix = found.values()
    assert radix == 192
    assert stock <= radix


def test_in_the_smallest_pool_a_request_is_served_without_copies(method):
    """Nothing that is cached could go for them."""
    engine = engine_of(RadixScheduler, blocks=1 + 2 * 3 + 2 * (1 + DRAFTS) + 2)
    first = prompt("first", 165)
    cached(engine, first=first)
    assert len(engine.outputs["first"]) == 10
    assert engine.copied == 0


@pytest.mark.parametrize("blocks, place", [(37, 165), (43, 128), (47, 165)])
def test_copies_are_left_out_only_where_a_request_fits_without(blocks, place):
    """One that would not fit from its beginning, either, has nothing to lose."""
    engine = engine_of(RadixScheduler, blocks=blocks)
    first = prompt("first", 165)
    cached(engine, first=first)
    engine.add("long", prompt("long", 512))
    engine.step()
    turn = [*first, *engine.outputs["first"], *prompt("more", 9)]
    request = RequestMaker(engine.scheduler).make("turn", turn, 4)
    manager = engine.scheduler.kv_cache_manager
    assert manager.get_computed_blocks(request)[1] == place


# -- planted bugs --------------------------------------------------------------


def fails(lag, method, seeds=12, **options):
    """Return whether some traffic reads what is wrong."""
    for seed in range(seeds):
        for layout in LAYOUTS:
            try:
                traffic(
                    layout,
                    seed,
                    RadixScheduler,
                    lag,
                    method,
                    room=60,
                    check=False,
                    **options,
                )
            except WrongReadError:
                return True
    return False


def test_the_state_after_guesses_taken_for_the_last_ones_is_caught(monkeypatch):
    """Of asynchronous steps there are more tokens than are known: nothing is left."""
    monkeypatch.setattr(
        StatePoints,
        "is_in_place",
        lambda self, plan, done: done <= plan.request.num_tokens,
    )
    assert fails(0, "n-gram")


@pytest.mark.parametrize("lag", LAGS)
def test_a_worker_that_puts_no_state_where_a_block_is_full_is_caught(lag, monkeypatch):
    settle = HybridDouble._settle_states

    def wrong(self, *args):
        with not_copying(self):
            settle(self, *args)

    monkeypatch.setattr(HybridDouble, "_settle_states", wrong)
    assert fails(lag, "n-gram", prefix_cache_retention_interval=64)


@pytest.mark.parametrize("lag", LAGS)
def test_a_prompts_end_kept_without_the_token_behind_it_is_caught(
    lag, eagle, monkeypatch
):
    monkeypatch.setattr(ResumePoint, "leads_to", lambda self, key: True)
    assert fails(lag, "EAGLE")


@pytest.mark.parametrize("lag", LAGS)
def test_a_junction_on_the_last_token_shared_is_caught_or_of_no_use(
    lag, eagle, monkeypatch
):
    """Nobody else can go on there: the token behind it is another one."""
    adopt = hybrid_manager.ResumePlans.__init__

    def wrong(self, *args, lookahead=0, **options):
        adopt(self, *args, lookahead=0, **options)

    monkeypatch.setattr(hybrid_manager.ResumePlans, "__init__", wrong)
    engine = engine_of(RadixScheduler, lag)
    engine.drafters = [3]
    shared = prompt("shared", 110)
    for name in "abc":
        engine.add(name, [*shared, *prompt(name, 80)], 10)
    engine.run()
    assert max(engine.cached.values()) < 109


def test_without_a_bug_nothing_is_caught(method):
    assert not fails(0, method, seeds=2)
    assert not fails(1, method, seeds=2)
