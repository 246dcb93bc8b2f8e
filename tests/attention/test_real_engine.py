"""Real engines: answers through the interpreted kernels are stock vLLM's.

The worker's host tables are compared with the runner's own at every step
(``answers.py``). A step of an interpreted model takes seconds, so these are short.
"""

import pytest

from support.answers import ENGINE, both, compare
from support.prompts import RequestMix

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

PREEMPTIONS = "vllm:num_preemptions"


def grouped(model, mix, engine):
    """Run both arms; return what the grouped one counted."""
    theirs, ours = both(model, mix.requests, engine, [PREEMPTIONS], attention="grouped")
    compared, ties = compare(theirs, ours, mix.requests)
    counts = ours["counts"]
    assert counts["scheduler"] == "RadixScheduler"
    assert compared > len(mix.requests) // 2
    assert ties <= compared // 20
    assert counts["checked_rows"] > 0
    assert counts["loaded_tokens"] < counts["stock_tokens"]
    return counts


def test_tiny_under_pressure_with_chunks_and_tails(tiny):
    mix = RequestMix(3, vocabulary=(10, 900))
    system = mix.words(70)
    for _ in range(2):
        document = mix.words(40)
        for _ in range(3):
            mix.add(system + document + mix.words(mix.rng.randrange(3, 14)))
    mix.chat(users=2, turns=2)
    # A prompt of more than a step, whose start the others have.
    mix.add(system + mix.words(150))
    engine = {
        **ENGINE,
        "load_format": "dummy",
        "num_gpu_blocks_override": 17,
        "max_num_batched_tokens": 64,
    }
    counts = grouped(tiny, mix, engine)
    assert counts["levels"] >= 2
    assert counts["nodes"] > counts["grouped_steps"] > 8
    assert counts["grouped_extends"] > 3
    assert counts["copies"] > 0, "no hit ended inside a block"
    assert counts["plans_kept"] > 0


def test_tiny_with_preemption(tiny):
    mix = RequestMix(5, vocabulary=(10, 900))
    system = mix.words(32)
    for _ in range(5):
        # Two blocks each, the first in common, and a third two tokens on.
        mix.add(system + mix.words(30), max_tokens=4)
    engine = {
        **ENGINE,
        "load_format": "dummy",
        "num_gpu_blocks_override": 9,
        "max_model_len": 128,
    }
    counts = grouped(tiny, mix, engine)
    assert counts[PREEMPTIONS] > 0
    assert counts["grouped_steps"] > 2


def test_smollm2_says_the_same(smollm2):
    mix = RequestMix(4)
    system = mix.words(64)
    for _ in range(2):
        document = mix.words(40)
        for _ in range(2):
            mix.add(system + document + mix.words(5), max_tokens=3)
    engine = {**ENGINE, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 128}
    counts = grouped(smollm2, mix, engine)
    assert counts["levels"] == 2
    assert counts["grouped_extends"] > 0
