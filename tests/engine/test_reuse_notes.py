"""What the eviction policy is told of requests, through the real scheduler."""

import pytest

from support.prompts import prompt
from support.traffic import serve, traffic
from vllm_radix.tree import POLICIES
from vllm_radix.tree.eviction import HitDensity

LEARNING = [name for name, policy in POLICIES.items() if policy.num_classes > 1]


@pytest.mark.parametrize("eviction", LEARNING)
@pytest.mark.parametrize("seed", range(2))
def test_reads_are_right_with_every_policy(eviction, seed):
    """Preemptions, aborts, dropped blocks and resets among them; all is checked."""
    engine = traffic(seed, requests=30, radix={"eviction": eviction})
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.tree.policy.name == eviction


def test_a_request_says_what_it_generated_and_what_of_it_was_new(monkeypatch):
    told = []
    label = HitDensity.label

    def noted(self, uses, output_tokens, new_tokens):
        told.append((uses, output_tokens, new_tokens))
        return label(self, uses, output_tokens, new_tokens)

    monkeypatch.setattr(HitDensity, "label", noted)
    tokens = prompt("shared", 64)
    serve(
        {"a": tokens, "b": tokens + prompt("b", 40)},
        max_tokens=5,
        block_size=16,
        num_blocks=100,
        max_num_seqs=1,
        radix={"eviction": "hit-density"},
    )
    assert (1, 5, 64) in told
    # The second found all four blocks of the first, and brought 40 tokens.
    assert {(2, 5, 40), (1, 5, 40)} <= set(told)
