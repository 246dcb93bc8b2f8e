"""A real server: `vllm serve` with and without --radix, talked to as users do."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from support.servers import NAME, VLLM, serving

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

SYSTEM = (
    "You are the guide of a small town's museum. You know the harbour, the stone "
    "bridge, the old clock and the flooded cellar. You answer in one short sentence, "
    "you never invent a date, and you say so when you do not know something. "
) * 3


def converse(client, topic):
    """Three turns of one conversation; return the answers and cached tokens."""
    messages = [{"role": "system", "content": SYSTEM}]
    answers, cached = [], []
    for question in (f"Tell me about {topic}.", "What else?", "Thank you, goodbye."):
        messages.append({"role": "user", "content": question})
        reply = client.chat.completions.create(
            model=NAME, messages=messages, temperature=0, max_tokens=24
        )
        answers.append(reply.choices[0].message.content)
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers, cached


def streamed(client):
    """One streamed completion, put together again."""
    chunks = client.completions.create(
        model=NAME, prompt=SYSTEM + "The museum", temperature=0, max_tokens=16,
        stream=True,
    )  # fmt: skip
    return "".join(chunk.choices[0].text for chunk in chunks)


def metric(base, name):
    """The sum of a counter over its labels."""
    lines = httpx.get(f"{base}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f"{name}{{")]
    assert found, f"no metric {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def bench(base, model, folder, *more):
    """vLLM's own load generator, on prompts that share prefixes."""
    result = folder / "bench.json"
    command = [VLLM, "bench", "serve", "--base-url", base, "--model", NAME]
    command += ["--tokenizer", model, "--dataset-name", "prefix_repetition"]
    command += ["--num-prompts", "12", "--prefix-repetition-prefix-len", "160"]
    command += ["--prefix-repetition-suffix-len", "16"]
    command += ["--prefix-repetition-num-prefixes", "3"]
    command += ["--prefix-repetition-output-len", "4", "--save-result"]
    command += ["--result-filename", str(result), "--disable-tqdm", *more]
    env = {**os.environ, "PYTHONHASHSEED": "0", "VLLM_PLUGINS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(result.read_text())


def talk(base, model, folder):
    """All of it; what must be the same for both servers comes first."""
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
    plain = client.completions.create(
        model=NAME, prompt="The stone bridge was built", temperature=0, max_tokens=16
    )
    texts = [plain.choices[0].text, streamed(client), streamed(client)]
    with ThreadPoolExecutor(2) as pool:
        topics = ["the harbour", "the old clock"]
        talks = list(pool.map(lambda topic: converse(client, topic), topics))
    texts += [answer for answers, _ in talks for answer in answers]
    before = metric(base, "vllm:prefix_cache_hits_total")
    load = bench(base, model, folder)
    return {
        "texts": texts,
        "cached": [cached for _, cached in talks],
        "hits": before,
        "bench completed": load["completed"],
        "bench hits": metric(base, "vllm:prefix_cache_hits_total") - before,
    }


def test_a_real_server_answers_as_stock_does(smollm2, tmp_path):
    seen = {}
    for arm, flags in (("stock", ()), ("radix", ("--radix",))):
        log = tmp_path / f"{arm}.log"
        with serving(smollm2, log, *flags) as base:
            seen[arm] = talk(base, smollm2, tmp_path)
        announced = "vllm-radix" in log.read_text()
        assert announced == (arm == "radix")
    assert seen["radix"]["texts"] == seen["stock"]["texts"]
    assert all(text.strip() for text in seen["radix"]["texts"])
    # The system prompt is cached by the second turn at the latest.
    for cached in seen["radix"]["cached"]:
        assert cached[1] > 0 and cached[2] >= cached[1]
    assert seen["radix"]["hits"] > 0
    assert seen["radix"]["bench completed"] == 12
    assert seen["radix"]["bench hits"] >= seen["stock"]["bench hits"] > 0


def run_vllm(*words):
    env = {**os.environ, "VLLM_PLUGINS": "radix", "COLUMNS": "100"}
    return subprocess.run([VLLM, *words], capture_output=True, text=True, env=env)


def test_the_flag_is_in_the_server_s_help():
    done = run_vllm("serve", "--help=radix")
    assert done.returncode == 0, done.stderr
    assert "prefix-aware scheduling" in done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--radix.polcy", "prefix"], "unknown radix option 'polcy'; options: policy"),
        (["--radix.policy", "sjf"], "'sjf' is not one of 'prefix', 'fcfs'"),
        (["--radix.record", "/no/such/t.jsonl"], "'/no/such/t.jsonl' is in no folder"),
    ],
)
def test_a_bad_option_stops_the_server_with_status_2(smollm2, option, message):
    done = run_vllm("serve", smollm2, *option)
    assert done.returncode == 2
    assert message in done.stderr
