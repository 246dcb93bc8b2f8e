"""Deployments of several engines that take long: `make deployments` runs them."""

import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from support.deployments import (
    Subscriber,
    as_texts,
    complete,
    complete_all,
    few_shot,
    free_ports,
    publish_events,
    resident,
    with_weights,
)
from support.servers import free_port, serving
from vllm_radix_bench.study import real_routers

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
SECONDS = 1800
ARMS = {"stock": (), "radix": ("--radix",)}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return with_weights(tiny, tmp_path_factory.mktemp("model") / "tiny")


def mixed(seed):
    """Prompts that repeat, go on, and part from each other inside blocks."""
    first, *others = few_shot(banks=3, questions=2, bank_tokens=100, seed=seed)
    return [first, *others, first, first[:77], first[:70] + [5] * 50, first * 2]


def test_ranks_tell_the_events_of_stock_and_answer_as_it(model, tmp_path, monkeypatch):
    """With one API server stock, with two of them radix."""
    # Block hashes begin with a number that is drawn otherwise.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    told, answered = {}, {}
    for servers, (arm, flags) in enumerate(ARMS.items(), start=1):
        port = free_ports(2)
        flags = (*flags, "--data-parallel-size", "2", *publish_events(port))
        flags += ("--api-server-count", str(servers))
        log = tmp_path / arm
        with (
            serving(model, log, *flags, seconds=SECONDS) as base,
            Subscriber([port, port + 1]) as events,
        ):
            answered[arm] = [
                complete(base, prompt, rank)[0]
                for rank in (0, 1)
                for prompt in mixed(rank)
            ]
            events.settle()
            told[arm] = [events.events(port + rank) for rank in (0, 1)]
    assert answered["radix"] == answered["stock"]
    assert len(told["stock"][0]) >= 5
    assert told["radix"] == told["stock"]
    assert resident(told["radix"][0]).isdisjoint(resident(told["radix"][1]))


def test_a_pipeline_of_two_answers_as_stock(model, tmp_path):
    """Not eagerly: then vLLM's CPU worker skips what the second stage needs."""
    flags = ["--pipeline-parallel-size", "2", "--no-enforce-eager"]
    flags += ["--compilation-config", json.dumps({"mode": 1, "backend": "eager"})]
    prompts, answered, cached = few_shot(banks=4, questions=4), {}, {}
    for arm, radix in ARMS.items():
        with serving(model, tmp_path / arm, *radix, *flags, seconds=SECONDS) as base:
            found = complete_all(base, prompts)
        answered[arm] = [text for text, _ in found]
        cached[arm] = sum(cached for _, cached in found)
    assert answered["radix"] == answered["stock"]
    assert cached["radix"] >= cached["stock"] > 0


def test_two_servers_find_more_behind_cache_aware_than_in_turn(tiny, tmp_path):
    output = tmp_path / "rows.json"
    words = ["--separate", "--arms", "radix", "--routings", "round_robin"]
    words += ["cache_aware", "equal placement", "--questions", "8", "--repeats", "1"]
    assert real_routers.main([tiny, *words, "--output", str(output)]) == 0
    rows = {row["routing"]: row for row in json.loads(output.read_text())["rows"]}
    assert {row["prompt_tokens"] for row in rows.values()} == {6 * 8 * 328}
    assert all(sum(row["requests"]) == 48 for row in rows.values())
    computed = {name: row["computed"] for name, row in rows.items()}
    assert computed["equal placement"] < computed["round_robin"]
    assert computed["cache_aware"] < computed["round_robin"]
    # Each bank, and each question, is computed at least once.
    assert min(computed.values()) >= 6 * 310 + 48 * 18


def test_replicas_of_ray_serve_answer_as_stock(model, tmp_path):
    """Behind Ray's PrefixCacheAffinityRouter, as the example has it."""
    python = ROOT / "build" / "ray" / "bin" / "python"
    assert python.exists(), "run it with `make deployments`"
    engine = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
    engine |= {"num_gpu_blocks_override": 42, "max_num_seqs": 8, "max_model_len": 1024}
    engine |= {"enable_prompt_tokens_details": True}
    # Its router takes prompts of text alone.
    prompts = as_texts(few_shot(banks=4, questions=6, bank_tokens=60))
    flags = ("--max-model-len", "1024")
    with serving(model, tmp_path / "stock", *flags, seconds=SECONDS) as base:
        expected = [text for text, _ in complete_all(base, prompts)]
    port, log = free_port(), tmp_path / "log"
    command = [str(python), str(ROOT / "examples/deployments/ray_serve.py"), model]
    command += ["--cpu", "--port", str(port), "--engine", json.dumps(engine)]
    # Its sockets' paths must be short.
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        ray = {"num_cpus": 8, "include_dashboard": False, "_temp_dir": folder}
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*command, "--ray", json.dumps(ray)],
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                # What both replicas say is said twice.
                env={**os.environ, "RAY_DEDUP_LOGS": "0"},
            )
        try:
            base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
            while not serves(base):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            found = complete_all(base, prompts)
            assert [text for text, _ in found] == expected
            assert log.read_text().count("scheduler RadixScheduler") == 2
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
        deadline = time.monotonic() + 60
        while left := running_with(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def running_with(word):
    """Return the command lines of processes that hold a word."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            found += [line] * (word in line)
    return found


def serves(base):
    """Return whether Ray's ingress names a model; before, it answers with an error."""
    try:
        reply = httpx.get(f"{base}/v1/models", timeout=30)
        return reply.status_code == 200 and bool(reply.json()["data"])
    except httpx.TransportError:
        return False
