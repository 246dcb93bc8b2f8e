"""KV events of several cache groups: stock's, byte by byte, where radix keeps the same.

The rules where it keeps more or less than stock:

- what several blocks hold is told each time it is stored, and gone with the last one;
- what leads to no resume point is let go at once, and told to be gone;
- junctions are told if they lie at whole blocks, all of them, and not only one;
- points inside blocks, and those where an answer ended, are not told.
"""

import msgspec
import pytest
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support.hybrid_double import STATE, HybridDouble, make_hybrid_scheduler
from support.prompts import prompt
from support.traffic import hybrid_traffic
from vllm_radix import RadixScheduler

EVERYTHING = "full/16+swa:40/16+chunked:64/16+mamba/32"
LAYOUTS = [
    "swa:48/16",
    "full/16+swa:64/16x2",
    "full/16+swa:40/32",
    "full/16+chunked:64/16",
    "full/32+mamba/32x3",
    "full/16+mamba/64x2",
    "full/16+swa:40/16+mamba/32",
    EVERYTHING,
]
LAGS = [0, 1]
EVENTS = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
AS_STOCK = {"policy": "fcfs", "sub_block": False}
SHARED = ("full/16+swa:64/16x2", "full/32+mamba/32x3")


@pytest.fixture
def heard(monkeypatch):
    """The events of all managers, as they are taken."""
    events = []
    take_events = KVCacheManager.take_events

    def take(self):
        taken = take_events(self)
        events.extend(taken)
        return taken

    monkeypatch.setattr(KVCacheManager, "take_events", take)
    return events


@pytest.fixture
def sent(monkeypatch):
    """The requests of all engines."""
    requests = []
    add = HybridDouble.add

    def note(self, *args, **fields):
        requests.append(add(self, *args, **fields))
        return requests[-1]

    monkeypatch.setattr(HybridDouble, "add", note)
    return requests


def engine_of(layout, cls=RadixScheduler, lag=0, num_blocks=400, **options):
    options = {"max_num_batched_tokens": 512, "max_num_seqs": 16, **options}
    scheduler = make_hybrid_scheduler(
        cls, layout, num_blocks, bool(lag), kv_events_config=EVENTS, **options
    )
    return HybridDouble(scheduler, lag)


def serve(engine, fields, turns=3):
    """Serve documents with questions one by one, and a conversation."""
    instructions = prompt("instructions", 70)
    for question in range(3):
        for text in range(3):
            tokens = [*instructions, *prompt(text, 150), *prompt((question, text), 20)]
            engine.add(f"{question}-{text}", tokens, 3, **fields)
            engine.run()
    said = []
    for turn in range(turns):
        said += prompt(("turn", turn), 60)
        engine.add(str(turn), said, 20, **fields)
        engine.run()
        said += engine.outputs[str(turn)]
    engine.scheduler.kv_cache_manager.take_events()


# -- as stock's ----------------------------------------------------------------


FIELDS = {
    "salt": {"cache_salt": "salt"},
    "lora": {"lora_request": LoRARequest("adapter", 1, "/adapter")},
    "full report": {"extra_args": {"kv_cache_report_mode": "full"}},
}


@pytest.mark.parametrize(
    ("layout", "interval", "lag", "fields"),
    [
        *(
            (layout, interval, 0, "")
            for layout, intervals in {
                # With 0, stock finds nothing of windows alone.
                "swa:48/16": (None, 64),
                "full/16+swa:64/16x2": (None, 0, 64),
                "full/16+swa:40/32": (None, 0, 64),
                "full/16+chunked:64/16": (None,),
                "full/32+mamba/32x3": (None, 0, 64),
                "full/16+swa:40/16+chunked:64/16+mamba/16": (None, 64),
            }.items()
            for interval in intervals
        ),
        *((layout, 0, 1, "") for layout in SHARED),
        *((layout, 0, 0, name) for layout in SHARED for name in FIELDS),
    ],
)
def test_what_is_stored_is_told_byte_by_byte_as_stock_does(
    layout, interval, lag, fields, heard
):
    options = {}
    if "swa" in layout or "mamba" in layout:
        options["prefix_cache_retention_interval"] = interval
    told, cached = [], []
    for cls in (AsyncScheduler if lag else Scheduler, RadixScheduler):
        heard.clear()
        engine = engine_of(layout, cls, lag, radix=AS_STOCK, **options)
        # Where an answer ended, stock keeps a window or a state for None alone.
        turns = 3 if interval is None else 1
        serve(engine, FIELDS.get(fields, {}), turns)
        stored = [event for event in heard if isinstance(event, BlockStored)]
        told.append([msgspec.msgpack.encode(event) for event in stored])
        cached.append(engine.cached)
    assert cached[0] == cached[1], "other hits: the events are not to be compared"
    assert told[0] == told[1]


# -- what is told is so --------------------------------------------------------


def known_from(events):
    """Return the hashes that are cached, as one knows who heard it all, by group."""
    known = set()
    for event in events:
        if isinstance(event, AllBlocksCleared):
            known.clear()
            continue
        told = {(event.group_idx, block) for block in event.block_hashes}
        if isinstance(event, BlockStored):
            known |= told
        else:
            assert isinstance(event, BlockRemoved)
            assert told <= known, "gone, and never stored"
            known -= told
    return known


def check_contents(engine, requests):
    """Fail where a block does not hold what its hash stands for."""
    pool = engine.scheduler.kv_cache_manager.block_pool
    size = engine.scheduler.hash_block_size
    tokens_of = {}
    for request in requests:
        for index, block_hash in enumerate(request.block_hashes):
            tokens_of[block_hash] = request, (index + 1) * size
    for key, holders in pool.cached_block_hash_to_block._cache.items():
        request, end = tokens_of[get_block_hash(key)[-32:]]
        group = get_group_id(key)
        chain = hash((engine._root(request), request.cache_salt))
        for token in request.all_token_ids[:end]:
            chain = hash((chain, token))
        spec = engine.specs[group]
        place = STATE if group in engine.states else spec.block_size - 1
        for block in holders.values() if isinstance(holders, dict) else [holders]:
            owner, held = engine.blocks[block.block_id]
            assert owner == group
            assert held[place] == chain, f"{block!r} of group {group}"
            assert block.block_id in pool.tree, "announced, and not to be found"


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_those_who_hear_all_events_know_what_is_cached(layout, lag, heard, sent):
    for seed in (3, 4):
        heard.clear()
        sent.clear()
        engine = hybrid_traffic(layout, seed, lag=lag, kv_events_config=EVENTS)
        manager = engine.scheduler.kv_cache_manager
        manager.take_events()
        cached = manager.block_pool.cached_block_hash_to_block._cache
        assert known_from(heard) == {
            (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
            for key in cached
        }
        assert cached
        assert any(isinstance(event, BlockRemoved) for event in heard)
        check_contents(engine, sent)


# -- where radix keeps more or less --------------------------------------------


def told_of(events, group, kind=BlockStored):
    return [
        block
        for event in events
        if isinstance(event, kind) and event.group_idx == group
        for block in event.block_hashes
    ]


def serve_one(engine, name, tokens, max_tokens=3):
    request = engine.add(name, tokens, max_tokens)
    engine.run()
    engine.scheduler.kv_cache_manager.take_events()
    return [maybe_convert_block_hash(block) for block in request.block_hashes]


def test_what_is_held_twice_is_gone_with_the_last(heard):
    """A state is missing where two part: the second computes what comes before."""
    engine = engine_of("full/16+mamba/16", radix=AS_STOCK)
    stem = prompt("stem", 64)
    first = serve_one(engine, "first", stem + prompt("a", 40))
    serve_one(engine, "second", stem + prompt("b", 40))
    assert engine.cached == {"first": 0, "second": 0}
    assert told_of(heard, 0).count(first[0]) == 2
    assert first[0] not in told_of(heard, 0, BlockRemoved)
    manager = engine.scheduler.kv_cache_manager
    (holder,) = [
        block.block_id
        for block in manager.block_pool.blocks
        if block.block_hash
        and get_group_id(block.block_hash) == 0
        and maybe_convert_block_hash(get_block_hash(block.block_hash)) == first[0]
    ]
    manager.evict_blocks({holder})
    manager.take_events()
    assert told_of(heard, 0, BlockRemoved).count(first[0]) == 1


def test_what_leads_to_no_resume_point_is_told_to_be_gone(heard):
    """With whole blocks alone, nobody reads the last block of a chunk again."""
    engine = engine_of("full/16+chunked:64/16", radix=AS_STOCK)
    blocks = serve_one(engine, "one", prompt("one", 200))
    assert told_of(heard, 1) == blocks[:12]
    assert set(told_of(heard, 1, BlockRemoved)) == {blocks[3], blocks[7], blocks[11]}


def test_every_junction_at_whole_blocks_is_told(heard):
    """Stock knows one junction of a request, and that of the second sighting."""
    options = {"prefix_cache_retention_interval": 0}
    engine = engine_of("full/16+swa:40/16", radix={"sub_block": False}, **options)
    tokens = prompt("one", 200)
    for at in (64, 128):
        engine.add(str(at), tokens[:at] + prompt(at, 40))
    blocks = serve_one(engine, "one", tokens)
    assert engine.cached == {"64": 0, "128": 64, "one": 128}
    # The last three blocks before where the others part, and before its own end.
    told = set(told_of(heard, 1))
    assert [block in told for block in blocks[:12]] == [False, True, True, True] * 3


def test_points_inside_blocks_and_ends_of_answers_are_kept_and_not_told(heard):
    options = {"prefix_cache_retention_interval": 0}
    engine = engine_of("full/16+mamba/16", radix={"min_sub_block_tokens": 1}, **options)
    said = prompt("hello", 100)
    blocks = serve_one(engine, "one", said, max_tokens=20)
    # The last whole block of the prompt, as stock.
    assert told_of(heard, 1) == [blocks[5]]
    said += [*engine.outputs["one"], *prompt("more", 20)]
    serve_one(engine, "two", said)
    assert engine.cached["two"] == 119
