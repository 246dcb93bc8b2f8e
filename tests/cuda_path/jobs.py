"""What the arms are asked: jobs of ``tools/gpu/engine_arm.py``, by name."""

import random
from typing import Any

from support.prompts import RequestMix

BLOCK = 16
NUM_BLOCKS = 44
ENGINE = {
    "dtype": "float32",
    "attention_backend": "TRITON_ATTN",
    "enforce_eager": True,
    "block_size": BLOCK,
    # One block is vLLM's own, the null block.
    "num_gpu_blocks_override": NUM_BLOCKS + 1,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 160,
    "max_model_len": 256,
}
WORDS = (3, 512)
ANSWERS = {"answers": True, "logprobs": 2}
EDGES = (-1, 0, 1)


def mixed() -> dict[str, Any]:
    """Return some 200 requests: chats, rollouts, few-shot, strangers, aborts.

    Hits end at any token; a prompt of more than a step's budget is computed in
    chunks, and so are most in a full step.
    """
    mix = RequestMix(11, vocabulary=WORDS)
    mix.chat(users=8, turns=3)
    mix.rollouts(tasks=6, leaves=8)
    mix.few_shot(banks=8, questions=4)
    for _ in range(90):
        mix.add(mix.words(mix.rng.randrange(5, 30)))
    for _ in range(3):
        mix.add(mix.words(mix.rng.randrange(165, 230)))
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 48):
        mix.add(mix.words(length))
    mix.abort_some(every=14)
    for request in mix.requests:
        request.update(n=1, max_tokens=1 + request["max_tokens"] % 3)
        if request.get("abort_after"):
            request["max_tokens"] = 8
    return {"requests": mix.requests, **ANSWERS}


def pressure() -> dict[str, Any]:
    """Return requests that do not fit with their answers: some are preempted."""
    mix = RequestMix(12, vocabulary=WORDS)
    system = mix.words(21)
    for _ in range(14):
        mix.add(system + mix.words(mix.rng.randrange(24, 48)), max_tokens=14)
    return {"requests": mix.requests, **ANSWERS}


def resets() -> dict[str, Any]:
    """Return requests in whose midst the cache is reset, twice."""
    mix = RequestMix(13, vocabulary=WORDS)
    mix.chat(users=5, turns=3)
    mix.few_shot(banks=2, questions=4)
    return {"requests": mix.requests, "reset_at": [5, 11], **ANSWERS}


def chats() -> dict[str, Any]:
    """Return conversations whose answers end by end-of-sequence."""
    mix = RequestMix(14, vocabulary=WORDS)
    for length in range(20, 20 + 2 * BLOCK):
        last = mix.add(mix.words(length), max_tokens=12, ignore_eos=False)
        mix.add(mix.words(5), after=last, max_tokens=2)
    return {"requests": mix.requests, **ANSWERS}


def first_turns() -> dict[str, Any]:
    """Return prompts whose answers are to end at, before and after a block's end."""
    rng = random.Random(15)
    requests = [
        {
            "id": f"{over}:{number}",
            "tokens": [rng.randrange(*WORDS) for _ in range(3 * BLOCK + over - 8)],
            "max_tokens": 8,
        }
        for over in EDGES
        for number in range(5)
    ]
    return {"requests": requests, **ANSWERS}


def edges(learned: dict[str, Any], per_edge: int = 2) -> dict[str, Any]:
    """Return those of the prompts again that a token can stop, and next turns.

    Args:
        learned: result of ``first_turns``.
        per_edge: conversations for each place.
    """
    rng, requests, taken = random.Random(16), [], dict.fromkeys(EDGES, 0)
    for one in first_turns()["requests"]:
        over = int(one["id"].partition(":")[0])
        said = learned["answers"][one["id"]]["outputs"][0]["tokens"]
        if said[-1] in said[:-1] or taken[over] == per_edge:
            continue
        taken[over] += 1
        requests.append({**one, "max_tokens": 30, "stop_token_ids": [said[-1]]})
        requests.append(
            {
                "id": f"{one['id']}:next",
                "after": one["id"],
                "tokens": [rng.randrange(*WORDS) for _ in range(9)],
                "max_tokens": 2,
            }
        )
    assert set(taken.values()) == {per_edge}, taken
    return {"requests": requests, **ANSWERS}


def sampled() -> dict[str, Any]:
    """Return prompts that are answered several times, by chance, with seeds."""
    mix = RequestMix(17, vocabulary=WORDS)
    stem = mix.words(40)
    for number in range(5):
        mix.add(
            stem[: 20 + 4 * number] + mix.words(6),
            max_tokens=6,
            n=3,
            temperature=1.0,
            seed=100 + number,
        )
    return {"requests": mix.requests, **ANSWERS}


def structured() -> dict[str, Any]:
    """Return prompts whose answers a grammar constrains."""
    mix = RequestMix(18, vocabulary=WORDS)
    stem = mix.words(35)
    for grammar in (
        {"choice": ["yes", "no", "maybe"]},
        {"regex": "[a-c]{4}"},
        {"choice": ["left", "right"]},
        {"regex": "[0-9]{2}-[0-9]{2}"},
    ):
        for _ in range(2):
            mix.add(
                stem + mix.words(3),
                max_tokens=12,
                structured=grammar,
                ignore_eos=False,
            )
    return {"requests": mix.requests, **ANSWERS}


JOBS = {
    made.__name__: made
    for made in (mixed, pressure, resets, chats, first_turns, sampled, structured)
}
