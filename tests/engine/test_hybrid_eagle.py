"""EAGLE and MTP beside windows: what a draft model keeps depends on the next token.

The engine double's drafters write each slot but a block's last with the token behind
it, after a step's tokens are said, and guesses behind those.
"""

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support.engine_double import WrongReadError
from support.hybrid_double import (
    HybridDouble,
    make_hybrid_scheduler,
    ngram_drafts,
    take_ngrams_for_eagle,
)
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine.resume_places import ResumePlaces

LAYOUTS = {
    "full/16+swa:64/16x2+full/16": [3],
    "full/16+swa:33/16+swa:17/8": [2],
    "swa:48/16+full/16": [0, 1],
}
"""Layouts, and the groups of the draft model."""
LAGS = [0, 1]
DRAFTS = 3


@pytest.fixture(autouse=True)
def as_eagle(monkeypatch):
    take_ngrams_for_eagle(monkeypatch)


def traffic(layout, seed, cls=RadixScheduler, lag=0):
    # What stock's drafters read is not judged here: its tokens are counted.
    drafters = LAYOUTS[layout] if cls is RadixScheduler else ()
    return hybrid_traffic(layout, seed, cls, lag, drafts=DRAFTS, drafters=drafters)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_traffic_reads_right_and_computes_less_than_stock(layout, lag):
    stock, radix = (
        [traffic(layout, seed, cls, lag) for seed in range(3)]
        for cls in (AsyncScheduler if lag else Scheduler, RadixScheduler)
    )
    assert sum(e.computed for e in radix) < sum(e.computed for e in stock)
    assert sum(engine.copied for engine in radix) > 0
    for engines in (stock, radix):
        assert all(engine.accepted > 20 for engine in engines)
        assert sum(len(engine.resumed) for engine in engines) > 0


@pytest.mark.parametrize("lag", LAGS)
def test_going_on_without_looking_ahead_is_caught(lag, monkeypatch):
    make = ResumePlaces.__init__
    monkeypatch.setattr(
        ResumePlaces, "__init__", lambda self, *words: make(self, *words[:-1], 0)
    )
    for seed in range(3):
        with pytest.raises(WrongReadError, match="of group 3"):
            traffic("full/16+swa:64/16x2+full/16", seed, lag=lag)


def engine_of(cls, lag=0, blocks=200, **options):
    options |= {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    if cls is RadixScheduler:
        options["radix"] = {"min_sub_block_tokens": 1}
    options["speculative_config"] = ngram_drafts(DRAFTS, lag)
    layout = "full/16+swa:64/16+full/16"
    scheduler = make_hybrid_scheduler(cls, layout, blocks, bool(lag), **options)
    engine = HybridDouble(scheduler, lag, drafts=DRAFTS)
    engine.drafters = [2] if cls is RadixScheduler else []
    return engine


def conversation(cls, lag=0):
    """Return what each of four requests found cached, one after the other."""
    engine = engine_of(cls, lag)
    shared = prompt("shared", 100)
    first = [*shared, *prompt("first", 20)]
    engine.add("first", first, 10)
    engine.run()
    engine.add("again", first, 10)
    engine.run()
    turn = [*first, *engine.outputs["first"], *prompt("more", 9)]
    engine.add("next turn", turn, 3)
    engine.run()
    for name in ("sibling", "one more"):
        engine.add(name, [*shared, *prompt(name, 20)], 3)
        engine.run()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return engine.cached


@pytest.mark.parametrize("lag", LAGS)
def test_a_request_goes_on_one_token_before_what_it_shares(lag):
    cached = conversation(RadixScheduler, lag)
    # The last token of a prompt is computed, and the one before for the draft model.
    assert cached["again"] == 120 - 1 - 1
    # Nine of ten said tokens are computed, or all with the last one's drafts.
    assert cached["next turn"] in (129 - 1, 130 - 1)
    assert cached["one more"] == 100 - 1
    stock = conversation(AsyncScheduler if lag else Scheduler, lag)
    assert all(stock[name] <= found for name, found in cached.items())


@pytest.mark.parametrize("shared", range(108, 114))
def test_a_junction_is_of_use_wherever_the_window_begins_in_a_block(shared):
    """One token before it, a window may need a block more."""
    engine = engine_of(RadixScheduler, prefix_cache_retention_interval=0)
    for name in "abc":
        engine.add(name, [*prompt("shared", shared), *prompt(name, 40)], 3)
        engine.run()
    assert engine.cached["c"] == shared - 1


def test_with_no_room_for_copies_a_prompt_goes_on_where_it_does_with_stock():
    prompts = dict.fromkeys(("first", "again"), prompt("one", 129))
    cached = {}
    for cls in (Scheduler, RadixScheduler):
        engine = engine_of(cls, blocks=31, prefix_cache_retention_interval=0)
        for name, tokens in prompts.items():
            engine.add(name, tokens, 3)
            engine.run()
        cached[cls] = engine.cached["again"]
    assert cached[RadixScheduler] >= cached[Scheduler] == 112
