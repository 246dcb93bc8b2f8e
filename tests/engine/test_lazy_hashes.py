"""Block hashes on demand: none computed unread, and vLLM's own when read."""

import gc
import weakref

import pytest
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from support.engine_double import EngineDouble, make_scheduler
from vllm_radix.engine.lazy_hashes import LazyHasher, LazyHashes

SIZE = 4


@pytest.fixture
def hasher():
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(SIZE, hash_fn)


def pair(hasher, tokens, **fields):
    """Return a request as vLLM hashes it, and one whose hashes wait."""
    params = SamplingParams(max_tokens=8)
    return [
        Request("r", list(tokens), params, None, block_hasher=one, **fields)
        for one in (hasher, LazyHasher(hasher, SIZE))
    ]


def test_they_are_those_of_stock_and_come_when_read(hasher):
    stock, lazy = pair(hasher, range(10), cache_salt="salt")
    hashes = lazy.block_hashes
    assert isinstance(hashes, LazyHashes)
    assert (len(hashes), hashes.num_computed) == (2, 0)
    for request in (stock, lazy):
        request.append_output_token_ids([5, 6, 7])
    assert (len(hashes), hashes.num_computed) == (3, 0)
    assert hashes[0] == stock.block_hashes[0]
    assert list(hashes) == stock.block_hashes
    assert hashes[1:] == stock.block_hashes[1:]
    assert hashes[-1] == stock.block_hashes[-1]
    assert hashes == stock.block_hashes
    assert lazy.block_hashes is hashes


def test_they_follow_a_streaming_session_that_drops_tokens(hasher):
    stock, lazy = pair(hasher, range(12), resumable=True)
    assert lazy.block_hashes[2] == stock.block_hashes[2]
    for request in (stock, lazy):
        # What the scheduler does to a session: keep 6 tokens, add others.
        del request._all_token_ids[6:]
        del request.block_hashes[6 // SIZE :]
        request._all_token_ids.extend([9] * 7)
        request.update_block_hashes()
    assert len(lazy.block_hashes) == len(stock.block_hashes) == 3
    assert list(lazy.block_hashes) == stock.block_hashes


def test_they_do_not_keep_their_request(hasher):
    _, lazy = pair(hasher, range(8))
    hashes, alive = lazy.block_hashes, weakref.ref(lazy)
    gc.disable()
    try:
        del lazy
        assert alive() is None
    finally:
        gc.enable()
    assert len(hashes) == 0


def test_a_run_without_readers_hashes_nothing():
    engine = EngineDouble(make_scheduler(num_blocks=20, max_num_seqs=3))
    for number in range(20):
        engine.add(str(number), [3 + number % 4] * 100, 40)
    engine.run()
    assert engine.scheduler.wants_lazy_hashes
    assert engine.hashed == 0


@pytest.mark.parametrize("events", [True, False])
def test_hashes_are_mirrored_for_who_reads_them(events):
    config = KVEventsConfig(enable_kv_cache_events=events, publisher="null")
    engine = EngineDouble(make_scheduler(num_blocks=20, kv_events_config=config))
    engine.add("a", [5] * 100, 4)
    engine.run()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.mirror == events
    assert bool(engine.hashed) == events
    assert len(pool.cached_block_hash_to_block) == 3 * events
    marked = [block for block in pool.blocks if block.block_hash is not None]
    assert len({block.block_hash for block in marked}) == len(marked) == 4
    assert sorted(b.block_hash_num_tokens for b in marked) == [32, 64, 96, 103]
