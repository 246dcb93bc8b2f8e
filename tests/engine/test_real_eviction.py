"""Replays with an eviction policy and with hints against a real engine, exactly."""

import random

import pytest

from vllm_radix_bench.ab.offline.arm import Settings, as_request
from vllm_radix_bench.ab.offline.process import ArmProcess
from vllm_radix_bench.replay import runner
from vllm_radix_bench.replay.arms import radix_arm
from vllm_radix_bench.workloads.turn import Turn, longest_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BLOCKS = 32
OPTIONS = runner.Options(
    [BLOCKS], block_size=32, max_num_seqs=2, max_num_batched_tokens=512
)
RADIX = {"policy": "fcfs", "eviction": "hit-density"}


def text(rng, length):
    return [rng.randrange(10, 500) for _ in range(length)]


def popular(rng, texts):
    """Return one of some texts, the first ones most often."""
    return texts[min(int(rng.paretovariate(0.8)) - 1, len(texts) - 1)]


def scan():
    """Questions about documents, and as many requests that never come again."""
    rng = random.Random(0)
    documents = [text(rng, 128) for _ in range(10)]
    return [
        Turn([*popular(rng, documents), *text(rng, 6)], 1)
        if rng.random() < 0.5
        else Turn(text(rng, 100), 1)
        for _ in range(260)
    ]


def chats(hints=False):
    """Conversations of several turns; with hints some are over, and some are kept."""
    rng = random.Random(0)
    systems = [text(rng, 96) for _ in range(8)]
    roots = []
    for number in range(120):
        at = Turn([*popular(rng, systems), *text(rng, 40)], 2)
        roots.append(at)
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            at.children.append(Turn(text(rng, 40), 2))
            if hints and number % 7 == 0:
                at.hints = {"radix_keep_for": 86_400}
            at = at.children[0]
        if hints:
            at.hints = {"radix_end_session": True}
    return roots


LOADS = {"scan": scan(), "chats": chats(), "chats with hints": chats(hints=True)}
LONGEST = max(longest_path(roots) for roots in LOADS.values())


def replayed(roots, radix, answers=None):
    arm = radix_arm("radix", radix)
    return runner.run_arm(arm, roots, BLOCKS, OPTIONS, LONGEST, answers=answers)


def hits(outcome):
    return {record.id: record.cached_tokens for record in outcome.records}


def test_policies_and_hints_are_replayed_exactly(tiny, tmp_path):
    settings = Settings(
        model=tiny,
        block_size=OPTIONS.block_size,
        num_blocks=BLOCKS,
        max_num_seqs=OPTIONS.max_num_seqs,
        max_num_batched_tokens=OPTIONS.max_num_batched_tokens,
        max_model_len=LONGEST + 1,
        gpu_memory_utilization=0.5,
        load_format="dummy",
        radix=RADIX,
    )
    engine = ArmProcess("radix", settings, tmp_path / "engine.log")
    try:
        engine.wait_until_ready()
        real = {name: engine.ask(as_request(roots)) for name, roots in LOADS.items()}
    finally:
        engine.stop()
    computed = {}
    for name, roots in LOADS.items():
        answers = {one["id"]: one["output"] for one in real[name]["records"]}
        outcome = replayed(roots, RADIX, answers)
        cached = {one["id"]: one["cached_tokens"] for one in real[name]["records"]}
        assert hits(outcome) == cached
        assert outcome.engine_steps == real[name]["engine_steps"]
        computed[name] = real[name]["computed_prompt_tokens"]
        assert outcome.computed_prompt_tokens == computed[name]
        lru = replayed(roots, {**RADIX, "eviction": "lru"}, answers)
        assert lru.computed_prompt_tokens > 1.02 * computed[name], "no pressure"
    assert computed["chats with hints"] < computed["chats"]
