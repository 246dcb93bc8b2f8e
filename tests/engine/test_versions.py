"""What supported versions of vLLM do differently: served as stock serves it."""

import inspect
import random
from itertools import count

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from support.engine_double import EngineDouble, make_kv_cache_config, make_scheduler
from support.hybrid_double import HybridDouble, make_hybrid_scheduler
from vllm_radix import RadixScheduler
from vllm_radix.engine.compat import defers_prefills
from vllm_radix.engine.lazy_hashes import LazyHasher
from vllm_radix.engine.lookahead import MAX_CONTINUATIONS, BlockLookahead
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.engine.public_prefixes import First

SIZE = 16
LOOKS_AHEAD = (
    "num_hash_lookahead_tokens" in inspect.signature(KVCacheManager).parameters
)
CAPS_HITS = "max_cache_hit_length" in (
    inspect.signature(KVCacheManager.get_computed_blocks).parameters
)
needs_lookahead = pytest.mark.skipif(
    not LOOKS_AHEAD, reason="vLLM hashes no tokens after a block before 0.33"
)


def make(cls, **options):
    return cls(
        kv_cache_config=make_kv_cache_config(SIZE, 5000),
        max_model_len=4096,
        scheduler_block_size=SIZE,
        hash_block_size=SIZE,
        log_stats=True,
        **options,
    )


def hasher_of(ahead):
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(SIZE, hash_fn, *[ahead][: bool(ahead)])


def request(request_id, tokens, hasher, **fields):
    params = SamplingParams(max_tokens=4)
    return Request(
        request_id, list(tokens), params, None, block_hasher=hasher, **fields
    )


def traffic(rng):
    """Yield prompts that often part at the end of a block, or just after it."""
    texts = [[rng.randrange(3, 9) for _ in range(200)] for _ in range(3)]
    while True:
        stem = rng.choice(texts)[: rng.randrange(12) * SIZE + rng.randrange(3)]
        yield stem + [rng.randrange(10, 13) for _ in range(rng.randrange(1, 40))]


def hits_of_both(seed, ahead=0, caps=False):
    """Run stock and ours over the same traffic; yield the hits of both."""
    rng = random.Random(seed)
    options = {"num_hash_lookahead_tokens": ahead} if ahead else {}
    managers = [make(cls, **options) for cls in (KVCacheManager, RadixKVCacheManager)]
    hasher, running = hasher_of(ahead), []
    for number, tokens in zip(range(300), traffic(rng), strict=False):
        if running and rng.random() < 0.5:
            ended = running.pop(rng.randrange(len(running)))
            for manager, one in zip(managers, ended, strict=True):
                manager.free(one)
        hashers = hasher, LazyHasher(hasher, SIZE, ahead)
        pair = [request(str(number), tokens, one) for one in hashers]
        most = [rng.randrange(len(tokens))] if caps else []
        hits = []
        for manager, one in zip(managers, pair, strict=True):
            manager.new_step_starts()
            blocks, hit, _ = manager.get_computed_blocks(one, *most)
            new = manager.allocate_slots(one, one.num_tokens - hit, hit, blocks)
            assert new is not None
            one.num_computed_tokens = one.num_tokens
            hits.append(hit)
        running.append(pair)
        managers[1].block_pool.check()
        yield hits


# -- hashes that cover tokens after their block --------------------------------


@needs_lookahead
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_hit_ends_where_other_tokens_follow_as_with_stock(seed, ahead):
    hits = list(hits_of_both(seed, ahead))
    assert all(theirs == ours for theirs, ours in hits)
    plain = [ours for _, ours in hits_of_both(seed)]
    assert sum(ours for _, ours in hits) < sum(plain), "some were cut short"


@needs_lookahead
def test_a_block_is_cached_once_the_tokens_after_it_are_known():
    manager = make(RadixKVCacheManager, num_hash_lookahead_tokens=1)
    one = request("one", range(2 * SIZE), LazyHasher(hasher_of(1), SIZE, 1))
    assert manager.allocate_slots(one, one.num_tokens) is not None
    assert manager.block_pool.tree.num_cached == 1


def test_what_came_after_a_block_is_told_by_salts_apart():
    """Else who guesses another's first private token would find one block more."""
    pool = make(RadixKVCacheManager).block_pool
    pool.keys.public = First(2 * SIZE)
    lookahead = BlockLookahead(pool.keys, 1)
    tokens = [*range(2 * SIZE), 77, 78]
    one, other, same = (
        request(name, tokens, hasher_of(0), cache_salt=salt)
        for name, salt in (("one", "a"), ("other", "b"), ("same", "a"))
    )
    lookahead.note(one, [1, 2], 0, [])
    hits = {}
    for guess in (one, other, same):
        blocks = [pool.blocks[1], pool.blocks[2]]
        lookahead.trim(guess, blocks)
        hits[guess.request_id] = len(blocks)
    assert hits == {"one": 2, "other": 1, "same": 2}


def test_what_came_after_a_block_is_not_remembered_for_ever():
    pool = make(RadixKVCacheManager).block_pool
    lookahead = BlockLookahead(pool.keys, 1)
    for after in range(2 * MAX_CONTINUATIONS):
        one = request(str(after), [*range(SIZE), 1000 + after], hasher_of(0))
        # Each computes a twin of the block that is kept.
        lookahead.note(one, [2], 0, [1] if after else [])
        blocks = [pool.blocks[1]]
        lookahead.trim(one, blocks)
        assert len(blocks) == (after > 0)
    first = request("first", [*range(SIZE), 1001], hasher_of(0))
    blocks = [pool.blocks[1]]
    lookahead.trim(first, blocks)
    assert not blocks


@pytest.mark.parametrize("ahead", [0, pytest.param(2, marks=needs_lookahead)])
def test_lazy_hashes_start_anew_when_they_are_cleared(ahead):
    hasher = hasher_of(ahead)
    hashers = hasher, LazyHasher(hasher, SIZE, ahead)
    stock, lazy = (request("r", range(40), one, resumable=True) for one in hashers)
    assert list(lazy.block_hashes) == stock.block_hashes
    for one in (stock, lazy):
        # What the scheduler does before it computes a session anew.
        one._all_token_ids[:4] = [99] * 4
        one.block_hashes.clear()
        one.update_block_hashes()
    assert lazy.block_hashes.num_computed == 0
    assert len(lazy.block_hashes) == len(stock.block_hashes) == 2
    assert list(lazy.block_hashes) == stock.block_hashes


# -- hits that may not go further ----------------------------------------------


@pytest.mark.skipif(not CAPS_HITS, reason="vLLM limits no hit before 0.33")
@pytest.mark.parametrize("seed", range(2))
def test_a_hit_is_no_longer_than_vllm_allows(seed):
    assert all(theirs == ours for theirs, ours in hits_of_both(seed, caps=True))


@pytest.mark.parametrize("layout", ["full/16+swa:40/16", "full/16+mamba/16"])
def test_nor_where_layers_are_of_several_kinds(layout):
    engine = HybridDouble(make_hybrid_scheduler(RadixScheduler, layout, 200))
    for name in ("a", "b"):
        engine.add(name, list(range(3, 153)), 4)
        engine.run()
    manager = engine.scheduler.kv_cache_manager
    again = engine.add("c", list(range(3, 153)), 4)
    free = manager.get_computed_blocks(again)[1]
    assert free > 64
    for most in (free, 64, 17, 0):
        blocks, hit, _ = manager.get_computed_blocks(again, most)
        assert hit <= most
        assert all(len(group) * 16 <= -(-hit // 16) * 16 for group in blocks.blocks)


# -- steps without prompts -----------------------------------------------------


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("throttled", [False, True])
def test_prefills_are_expected_where_vllm_computes_some(slots, interval, throttled):
    scheduler = make_scheduler(
        num_blocks=400, prefill_schedule_interval=interval, max_num_seqs=slots
    )
    engine = EngineDouble(scheduler)
    schedule, steps = scheduler.schedule, count()
    seen = {True: 0, False: 0}

    def watched():
        throttle = throttled and next(steps) % 3 > 0
        deferred = defers_prefills(scheduler, throttle)
        wait = len(scheduler.waiting)
        room = wait and len(scheduler.running) < slots
        output = schedule(throttle)
        if deferred:
            assert not output.scheduled_new_reqs
        elif room:
            assert output.scheduled_new_reqs
        seen[deferred] += bool(room)
        return output

    scheduler.schedule = watched
    for number in range(40):
        engine.add(str(number), [3 + number] * 50, 12)
        engine.step()
        engine.step()
    engine.run()
    assert seen[False]
    # Until 0.32 only an engine with data parallelism was told to.
    local = interval > 1 and hasattr(scheduler, "local_prefill_interval")
    assert bool(seen[True]) == (throttled or local)
