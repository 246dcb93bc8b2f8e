"""Real engines beside each other: radix gives the answers that stock vLLM gives.

Under eviction pressure, with hits inside blocks, aborts, several answers to one
prompt, speculative decoding and a KV connector. Greedy answers may differ where the
model is undecided: where its two likeliest tokens are within 1e-3.
"""

import pytest

from support.answers import ENGINE, answers, both, compare
from support.prompts import RequestMix, small_mix

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_200_greedy_answers_of_a_real_model_equal_stocks(smollm2):
    mix = RequestMix()
    mix.chat(users=10, turns=4)
    mix.rollouts(tasks=8, leaves=8)
    mix.few_shot(banks=8, questions=6)
    mix.alone(count=60)
    mix.abort_some(every=12)
    engine = {**ENGINE, "num_gpu_blocks_override": 26}
    theirs, ours = both(smollm2, mix.requests, engine)
    compared, ties = compare(theirs, ours, mix.requests)
    print(f"{compared} answers, {ties} ties; {theirs['counts']}; {ours['counts']}")
    assert compared >= 200
    assert ties <= 2
    assert ours["counts"]["copies"] > 20, "no hits inside blocks"
    assert ours["counts"]["aborted"] > 3
    assert ours["counts"]["hashes"] == 0
    assert ours["counts"]["scheduled"] < 0.9 * theirs["counts"]["scheduled"]
    assert ours["counts"]["scheduler"] == "RadixScheduler"


def test_speculative_decoding_accepts_and_answers_as_stock(tiny):
    requests = small_mix(1)
    for request in requests:
        request["tokens"] += [7, 8, 9, 7, 8, 9]
        request["max_tokens"] = 12
        request["n"] = 1  # vLLM's CPU sampler fails on top_k beside drafts
    drafts = "vllm:spec_decode_num_draft_tokens"
    engine = {
        **ENGINE,
        "load_format": "dummy",
        "num_gpu_blocks_override": 30,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    }
    theirs, ours = both(tiny, requests, engine, [drafts])
    compared, ties = compare(theirs, ours, requests)
    assert (compared, ties) == (len(requests), 0)
    assert ours["counts"][drafts] > 100
    assert ours["counts"]["copies"] > 0


def test_an_offloading_connector_stores_and_loads_as_with_stock(tiny):
    """vLLM's connector to CPU memory; only its CUDA worker is replaced."""
    mix = RequestMix(2, vocabulary=(10, 900))
    mix.few_shot(banks=6, questions=4)
    last = mix.add(mix.words(200))
    again = [dict(request) for request in mix.requests[:24]]
    # Once more when the cache has gone through everything else.
    for request in again:
        mix.add(request["tokens"], after=last)
    requests = mix.requests
    hits = "vllm:external_prefix_cache_hits"
    engine = {
        **ENGINE,
        "load_format": "dummy",
        "num_gpu_blocks_override": 24,
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": 1 << 27,
                "spec_name": "PlainOffloadingSpec",
                "spec_module_path": "support.plain_offload",
            },
        },
    }
    theirs, ours = both(tiny, requests, engine, [hits], policy="fcfs")
    assert compare(theirs, ours, requests) == (len(requests), 0)
    assert theirs["counts"][hits] == ours["counts"][hits] > 100
    assert theirs["counts"]["scheduled"] == ours["counts"]["scheduled"]
    radix = {"scheduler_cls": "vllm_radix.RadixScheduler"}
    (ours,) = answers(tiny, requests, [{**engine, **radix}], [hits])
    assert compare(theirs, ours, requests) == (len(requests), 0)
    # In its own order, a prefix may be found before it has to be loaded again.
    assert ours["counts"]["scheduled"] <= theirs["counts"]["scheduled"]
    assert ours["counts"]["hashes"] > 0, "a connector needs vLLM's own hashes"
    assert ours["counts"]["copies"] == 0, "a connector knows whole blocks"
