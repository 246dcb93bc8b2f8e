"""A real engine: salts share the declared system turn, and the answers stay equal."""

import pytest

from support.answers import ENGINE, answers

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SYSTEM = (
    "You are the assistant of a small shop that sells bicycles, their spare parts and "
    "tools. Answer in one short sentence, never mention other shops, and ask for the "
    "number of the order whenever somebody complains about one. Prices are in euros."
)
QUESTION = "Which oil is right for a chain that is used in rain?"


def test_two_salts_share_the_system_turn_and_give_equal_answers(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def chat(name, salt, question, after=None, system=SYSTEM):
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
        ]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer.encode(text, add_special_tokens=False)
        request = {"id": name, "tokens": tokens, "max_tokens": 12, "after": after}
        return {**request, "salt": salt, "fresh": True} if salt else request

    requests = [
        chat("a", "a", QUESTION),
        chat("b", "b", QUESTION, after="a"),
        chat("a again", "a", QUESTION, after="b"),
        chat("other system", "b", QUESTION, after="a again", system=SYSTEM[:-1] + "!"),
    ]
    public = [[{"role": "system", "content": SYSTEM}]]
    radix = {"public_prefix": {"prompts": public}}
    engine = {
        **ENGINE,
        "scheduler_cls": "vllm_radix.RadixScheduler",
        "additional_config": {"radix": radix},
    }
    (result,) = answers(smollm2, requests, [engine])
    cached = {name: one["cached"] for name, one in result["answers"].items()}
    said = {
        name: one["outputs"][0]["tokens"] for name, one in result["answers"].items()
    }
    length = len(requests[0]["tokens"])
    turn = length - len(tokenizer.encode(QUESTION)) - 4
    assert (cached["a"], cached["other system"]) == (0, 0)
    assert 32 <= cached["b"] <= turn and cached["b"] % 32 == 0
    assert cached["b"] + 32 > turn - 4, "all whole blocks of the system turn"
    assert cached["a again"] == length - 1
    assert said["a"] == said["b"] == said["a again"]
