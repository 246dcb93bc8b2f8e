"""The manager beside vLLM's own: the same calls, the same hits."""

import random

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from support.engine_double import make_kv_cache_config
from vllm_radix.engine.manager import RadixKVCacheManager

SIZE = 32


def make(cls, num_blocks, **options):
    return cls(
        kv_cache_config=make_kv_cache_config(SIZE, num_blocks),
        max_model_len=4096,
        scheduler_block_size=SIZE,
        hash_block_size=SIZE,
        log_stats=True,
        **options,
    )


def request(request_id, tokens):
    hasher = get_hash_fn_by_name("sha256")
    init_none_hash(hasher)
    return Request(
        request_id,
        tokens,
        SamplingParams(max_tokens=4),
        None,
        block_hasher=get_request_block_hasher(SIZE, hasher),
    )


@pytest.mark.parametrize(
    ("use_eagle", "num_blocks"),
    # EAGLE computes cached blocks again. Stock keeps both copies and we keep one,
    # so under pressure ours holds more: compared where nothing is evicted.
    [(False, 40), (True, 5000)],
)
@pytest.mark.parametrize("seed", range(4))
def test_hits_are_those_of_stock_call_by_call(seed, use_eagle, num_blocks):
    """Admissions and ends at random, with LRU eviction under way."""
    rng = random.Random(seed)
    managers = [
        make(cls, num_blocks, use_eagle=use_eagle)
        for cls in (KVCacheManager, RadixKVCacheManager)
    ]
    texts = [[rng.randrange(3, 9) for _ in range(400)] for _ in range(5)]
    running = []
    for number in range(300):
        if running and rng.random() < 0.5:
            ended = running.pop(rng.randrange(len(running)))
            for manager, one in zip(managers, ended, strict=True):
                manager.free(one)
            continue
        stem = rng.choice(texts)[: rng.randrange(1, 400)]
        tokens = stem + [rng.randrange(10, 99) for _ in range(rng.randrange(1, 40))]
        pair = [request(f"{number}", list(tokens)) for _ in managers]
        answers = []
        for manager, one in zip(managers, pair, strict=True):
            manager.new_step_starts()
            blocks, hit, boundary = manager.get_computed_blocks(one)
            got = manager.allocate_slots(one, one.num_tokens - hit, hit, blocks)
            answers.append((hit, boundary, got is not None))
            if got is not None:
                one.num_computed_tokens = one.num_tokens
        (their_hit, *_, their_fit), (our_hit, *_, our_fit) = answers
        assert (our_hit, our_fit) == (their_hit, their_fit)
        if our_fit:
            running.append(pair)
        managers[1].block_pool.check()
    stats = [manager.make_prefix_cache_stats() for manager in managers]
    assert stats[0].hits == stats[1].hits


def test_nothing_is_looked_up_when_caching_is_off():
    manager = make(RadixKVCacheManager, 40, enable_caching=False)
    one = request("one", list(range(100)))
    for _ in range(2):
        blocks, hit, _ = manager.get_computed_blocks(one)
        assert (hit, blocks) == (0, manager.empty_kv_cache_blocks)
        assert manager.allocate_slots(one, 100) is not None
        manager.free(one)
    assert manager.block_pool.tree.stats().cached_blocks == 0
