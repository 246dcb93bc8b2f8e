"""Models of several KV cache groups: radix answers as stock and as a cold engine do.

Full attention beside windows, chunks or states, and windows alone. Each toy serves one
mix of requests in a pool that is too small for it, and then each of them again, alone
and with an empty cache. How far apart right answers may be is measured beside it, on
stock: warm against cold, and with steps of other sizes.
"""

import pytest

from support.answers import NGRAM, both, compare
from support.prompts import RequestMix
from support.toy_models import HYBRID_TOYS, make_toy

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

ENGINE = {
    "max_num_seqs": 6,
    "max_model_len": 384,
    "max_num_batched_tokens": 512,
    "load_format": "dummy",
}
WINDOWS = {"block_size": 32}
# With pools in which some hits are evicted and some requests are preempted.
ENGINES = {
    "gemma3": {**WINDOWS, "num_gpu_blocks_override": 48},
    "gpt_oss": {**WINDOWS, "num_gpu_blocks_override": 30},
    "llama4": {**WINDOWS, "num_gpu_blocks_override": 52},
    "gemma4": {**WINDOWS, "num_gpu_blocks_override": 44},
    "mistral_swa": {**WINDOWS, "num_gpu_blocks_override": 17},
    "granite4": {"num_gpu_blocks_override": 22},
    "nemotron_h": {"num_gpu_blocks_override": 22},
    "falcon_h1": {"num_gpu_blocks_override": 12},
    "zamba2": {"num_gpu_blocks_override": 40},
    # What decoding and prefill compute differs in bfloat16: nobody is preempted.
    "qwen3_next": {"dtype": "bfloat16", "num_gpu_blocks_override": 60},
}
PREEMPTIONS = "vllm:num_preemptions"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
RESOLUTION = 1e-5  # of log-probabilities in float32
ORIGINAL, CHANGED = "0", "4"


class HybridMix(RequestMix):
    """Requests that share more than a window, or part of a block of states.

    Args:
        continued: whether turns of a conversation have the answers in their prompts.
        fields: of all requests.
    """

    def __init__(self, continued=True, **fields):
        super().__init__(3, vocabulary=(10, 900))
        self.fields = fields
        stem = self.words(300)
        for _ in range(4):
            self.ask(stem + self.words(40))
        # As the first, but for one early block.
        first = self.requests[0]["tokens"]
        assert self.ask(first[:64] + self.words(32) + first[96:]) == CHANGED
        # They grow over the ends of blocks.
        for _ in range(5):
            last = self.ask(self.words(245), max_tokens=50)
        # When there is room again.
        stem = self.words(300)
        for _ in range(4):
            last = self.ask(stem + self.words(40), after=last, fresh=True)
        said = self.words(250)
        last = self.ask(said, after=last, fresh=True)
        for _ in range(2):
            words = self.words(30)
            said = words if continued else said + words
            last = self.ask(said, after=last, fresh=not continued)

    def ask(self, tokens, **fields):
        return self.add(tokens, **{"max_tokens": 16, **self.fields, **fields})


def distance(one, other):
    """Return how far apart log-probabilities of two engines' answers are at most."""
    worst = 0.0
    for name, answer in one.items():
        for a, b in zip(answer["outputs"], other[name]["outputs"], strict=True):
            for i, (p, q) in enumerate(zip(a["top"], b["top"], strict=True)):
                if a["tokens"][i] != b["tokens"][i]:
                    break
                worst = max(worst, abs(p[0] - q[0]))
    return worst


def effect_of_a_block(result):
    """Return how far a changed early block moves the log-probabilities."""
    changed, original = (
        [step[0] for step in result["answers"][name]["outputs"][0]["top"]]
        for name in (CHANGED, ORIGINAL)
    )
    return max(abs(a - b) for a, b in zip(changed, original, strict=True))


LIKE_OTHERS = ("gemma4", "mistral_swa", "nemotron_h", "zamba2")
"""Toys whose kinds of layers others have, too: run by `make deployments` alone."""


@pytest.mark.parametrize(
    "toy",
    [
        pytest.param(toy, marks=[pytest.mark.slow] * (toy in LIKE_OTHERS))
        for toy in HYBRID_TOYS
        if toy != "qwen3_next"
    ],
)
def test_answers_equal_stocks_and_those_of_a_cold_engine(toy, tiny, tmp_path):
    requests = HybridMix().requests
    engine = {**ENGINE, **ENGINES[toy]}
    model = make_toy(toy, tmp_path, tiny)
    theirs, ours = both(model, requests, engine, [PREEMPTIONS], cold=[512, 96])

    noise = max(
        distance(theirs["answers"], theirs["cold"][0]),
        distance(*theirs["cold"]),
        RESOLUTION,
    )
    assert noise < 1e-3
    for result in (theirs, ours):
        assert effect_of_a_block(result) > 100 * noise
        assert result["counts"]["lost_blocks"] == 0
        assert result["counts"][PREEMPTIONS] > 0
        assert compare({"answers": result["cold"][0]}, result, requests)[1] <= 1
        assert distance(result["answers"], result["cold"][0]) <= 5 * noise
    compared, ties = compare(theirs, ours, requests)
    assert compared >= len(requests) - 4
    assert ties <= 1
    assert distance(theirs["answers"], ours["answers"]) <= 5 * noise
    assert ours["counts"]["scheduler"] == "RadixScheduler"
    assert ours["counts"]["copies"] > 0, "no hits inside blocks"
    assert ours["counts"]["scheduled"] < theirs["counts"]["scheduled"]


def test_states_of_the_delta_rule_are_equal_bit_by_bit(tiny, tmp_path):
    requests = HybridMix(continued=False).requests
    engine = {**ENGINE, **ENGINES["qwen3_next"]}
    model = make_toy("qwen3_next", tmp_path, tiny)
    theirs, ours = both(model, requests, engine, [PREEMPTIONS], cold=[512])

    for result in (theirs, ours):
        assert effect_of_a_block(result) > 0.1
        assert result["counts"]["lost_blocks"] == 0
        assert result["counts"][PREEMPTIONS] == 0
        for name, answer in result["answers"].items():
            cold = result["cold"][0][name]
            assert answer["outputs"] == cold["outputs"], name
            assert answer["outputs"] == theirs["answers"][name]["outputs"], name
    assert ours["counts"]["scheduler"] == "RadixScheduler"
    assert ours["counts"]["scheduled"] < theirs["counts"]["scheduled"]


@pytest.mark.slow
def test_states_of_the_delta_rule_beside_drafts(tiny, tmp_path):
    """Stock's answers, with copies at the ends of prompts and guesses behind them."""
    # Of few tokens, so that what was said comes again, and some guesses are right.
    requests = HybridMix(continued=False, allowed=[*range(10, 16)]).requests
    engine = {**ENGINE, **ENGINES["qwen3_next"], "speculative_config": NGRAM}
    engine["num_gpu_blocks_override"] = 200
    model = make_toy("qwen3_next", tmp_path, tiny)
    theirs, ours = both(model, requests, engine, [ACCEPTED])
    for name, answer in ours["answers"].items():
        assert answer["outputs"] == theirs["answers"][name]["outputs"], name
    for result in (theirs, ours):
        assert result["counts"]["lost_blocks"] == 0
        assert result["counts"][ACCEPTED] > 20
    assert ours["counts"]["scheduler"] == "RadixScheduler"
    assert ours["counts"]["copies"] > 0
    assert ours["counts"]["scheduled"] < theirs["counts"]["scheduled"]
