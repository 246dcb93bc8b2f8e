"""The block pool by itself: adoption, blank blocks first, the list stays true."""

import pytest
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from support.engine_double import EngineDouble, make_kv_cache_config, make_scheduler
from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.tree import LRU


def test_a_pool_in_use_is_not_adopted():
    pool = BlockPool(8, True, 4)
    pool.get_new_blocks(1)
    with pytest.raises(RuntimeError, match="in use already"):
        RadixBlockPool.adopt(pool, LRU())


def test_manager_and_pool_can_be_made_directly():
    arguments = {
        "kv_cache_config": make_kv_cache_config(num_blocks=8),
        "max_model_len": 512,
        "scheduler_block_size": 32,
        "hash_block_size": 32,
    }
    made = RadixKVCacheManager(**arguments)
    assert isinstance(made.block_pool, RadixBlockPool)
    assert type(KVCacheManager(**arguments).block_pool) is BlockPool
    pool = RadixBlockPool(8, True, 4)
    assert pool.num_blank_blocks == 7
    pool.check()


def cached_pool():
    """A pool of 15 blocks: 4 and 3 cached and idle, a partial one after each."""
    engine = EngineDouble(make_scheduler(num_blocks=16))
    for name, first, length in (("a", 5, 130), ("b", 6, 100)):
        engine.add(name, [first] * length, max_tokens=1)
        engine.run()
    return engine, engine.scheduler.kv_cache_manager.block_pool


def test_blank_blocks_go_before_cached_ones():
    _, pool = cached_pool()
    assert pool.tree.stats().idle_blocks == 9
    assert pool.tree.stats().partial_blocks == 2
    assert pool.num_blank_blocks == 6
    taken = pool.get_new_blocks(6)
    assert pool.tree.stats().idle_blocks == 9
    pool.get_new_blocks(2)  # now the partial blocks, which nobody has hit
    assert pool.tree.stats().idle_blocks == 7
    assert pool.tree.stats().partial_blocks == 0
    pool.get_new_blocks(2)  # and now the oldest tail goes, block by block
    assert pool.tree.stats().idle_blocks == 5
    pool.check()
    pool.free_blocks(taken)
    pool.check()
    assert pool.num_blank_blocks == 6


def test_no_more_blocks_than_there_are():
    _, pool = cached_pool()
    with pytest.raises(ValueError, match="Cannot get 16 free blocks"):
        pool.get_new_blocks(16)
    assert len(pool.get_new_blocks(15)) == 15
    pool.check()
    assert pool.tree.stats().cached_blocks == 0


def test_unpinned_blocks_count_as_free_and_say_when_they_are_reused():
    _, pool = cached_pool()
    reused = []
    blocks = pool.get_new_blocks(2)
    pool.unpin_blocks(blocks, reused.append)
    assert pool.get_num_free_blocks() == 15
    pool.get_new_blocks(15)
    assert {b.block_id for b in reused} == {b.block_id for b in blocks}
    pool.check()


def test_evicting_a_held_block_leaves_it_with_its_request():
    engine, pool = cached_pool()
    engine.add("c", [5] * 130, max_tokens=8)
    engine.step()
    assert engine.cached["c"] == 128
    first = pool.tree.match(pool.keys.key(engine.scheduler.requests["c"], 128)).blocks[
        0
    ]
    pool.evict_blocks({first})
    pool.check()
    engine.run()
    assert len(engine.outputs["c"]) == 8
    pool.check()


def test_failed_blocks_take_what_was_computed_from_them_along():
    """Else the wrong tail would be found once the prefix is computed again."""
    engine, pool = cached_pool()
    engine.add("c", [5] * 130, max_tokens=1)
    chain = pool.match(engine.scheduler.requests["c"], 128).blocks
    assert len(chain) == 4
    pool.evict_blocks({chain[1]})
    assert [block in pool.tree for block in chain] == [True, False, False, False]
    pool.check()
    engine.run()
    assert engine.cached["c"] == 32


def events_of(engine):
    """Record the events of an engine as they are taken."""
    pool = engine.scheduler.kv_cache_manager.block_pool
    seen, take = [], pool.take_events

    def watched():
        taken = take()
        seen.extend(taken)
        return taken

    pool.take_events = watched
    return seen


@pytest.mark.parametrize("asynchronous", [False, True])
def test_events_tell_a_subscriber_what_is_cached(asynchronous):
    """Replays the stream; it must name exactly the hashes that can be found.

    Every other prompt skips the look-up, so there are duplicates, and they do not
    all fit, so there are evictions.
    """
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = EngineDouble(
        make_scheduler(
            num_blocks=18,
            max_num_seqs=4,
            kv_events_config=events,
            asynchronous=asynchronous,
        ),
        lag=int(asynchronous),
    )
    seen = events_of(engine)
    pool = engine.scheduler.kv_cache_manager.block_pool
    for number in range(24):
        tokens = [3 + number // 2 % 9] * (70 + 20 * (number % 3))
        engine.add(str(number), tokens, prompt_logprobs=number % 2 or None)
    known, removed, spares = set(), 0, 0
    while engine.scheduler.has_requests() or engine.in_flight:
        engine.step()
        pool.take_events()
        for event in seen:
            if isinstance(event, BlockStored):
                known |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                known -= set(event.block_hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                known.clear()
        removed += sum(isinstance(event, BlockRemoved) for event in seen)
        spares += pool.tree.stats().duplicate_blocks
        seen.clear()
        cached = {
            maybe_convert_block_hash(get_block_hash(block.block_hash))
            for i, block in enumerate(pool.blocks)
            if block.block_hash is not None and not pool.tree.partial_tokens(i)
        }
        assert known == cached
    assert removed and spares, "the case has no evictions, or no duplicates"


def test_a_duplicate_that_ends_is_no_removal():
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = EngineDouble(make_scheduler(num_blocks=24, kv_events_config=events))
    seen = events_of(engine)
    for name in "ab":
        engine.add(name, [5] * 200, max_tokens=1, prompt_logprobs=1)  # no look-up
    engine.run()
    engine.scheduler.kv_cache_manager.take_events()
    assert engine.cached == {"a": 0, "b": 0}
    assert not [event for event in seen if isinstance(event, BlockRemoved)]
    assert engine.scheduler.kv_cache_manager.block_pool.num_blank_blocks == 23 - 6 - 1
