"""Several engines in one server: answers, options, metrics, events, and a router."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.deployments import (
    Subscriber,
    complete,
    complete_all,
    few_shot,
    free_ports,
    publish_events,
    resident,
    routing,
    with_weights,
)
from support.servers import serving

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]

SMALL = ("--num-gpu-blocks-override", "42", "--max-model-len", "1024")
SIZE = 32
# Six banks of ten blocks, where a rank has room for four.
PROMPTS = few_shot(banks=6, questions=3)
SECONDS = 900
RANKS = (0, 1)


class Metrics:
    """What /metrics says at a moment."""

    def __init__(self, base):
        text = httpx.get(f"{base}/metrics").text
        self._samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def of(self, name, engine):
        found = [
            sample.value
            for sample in self._samples
            if sample.name == name and sample.labels["engine"] == str(engine)
        ]
        return sum(found)

    def labels(self, name):
        found = [sample.labels for sample in self._samples if sample.name == name]
        return sorted(found, key=lambda labels: labels["engine"])


def wait_for(base, done):
    """Return the metrics that show what is done; a step's come after it."""
    deadline = time.monotonic() + 30
    while not done(metrics := Metrics(base)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return metrics


QUERIED = ("vllm:prefix_cache_queries_total", "vllm_radix:queried_tokens_total")


def queried(base, since, tokens):
    """Return the metrics once tokens have been looked up since others."""

    def all_of_them(metrics):
        return all(
            sum(metrics.of(name, rank) - since[name, rank] for rank in RANKS) == tokens
            for name in QUERIED
        )

    return wait_for(base, all_of_them)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return with_weights(tiny, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """What one engine of stock vLLM answers."""
    log = tmp_path_factory.mktemp("stock") / "log"
    with serving(model, log, *SMALL, seconds=SECONDS) as base:
        found = complete_all(base, PROMPTS)
        other_bank = PROMPTS[1][:310] + PROMPTS[0][310:]
        assert complete(base, other_bank)[0] != found[0][0]
    return [text for text, _ in found]


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """Two data-parallel engines with events, behind vllm-router."""
    folder, port = tmp_path_factory.mktemp("two"), free_ports(2)
    flags = ["--radix.patience", "2.5", "--data-parallel-size", "2"]
    flags += ["--api-server-count", "1", "--enable-scale-out"]
    ports = [port + rank for rank in RANKS]
    with ExitStack() as stack:
        started = serving(
            model,
            folder / "log",
            *flags,
            *SMALL,
            *publish_events(port),
            seconds=SECONDS,
        )
        base = stack.enter_context(started)
        events = stack.enter_context(Subscriber(ports))
        endpoints = ",".join(f"tcp://127.0.0.1:{port}" for port in ports)
        sources = ["--kv-event-source", f"{base}={endpoints}"]
        sources += ["--kv-event-block-size", str(SIZE)]
        options = ["--kv-event-model", "any", "--intra-node-data-parallel-size", "2"]
        router = stack.enter_context(
            routing(folder / "router", "kv_aware", [base], *options, *sources)
        )
        yield SimpleNamespace(
            base=base, events=events, ports=ports, router=router, sources=sources
        )


def held(events, prompt):
    """Return the tokens of a prompt's resident blocks, up to the first that is not."""
    chains, length = resident(events), 0
    while length + SIZE < len(prompt) and tuple(prompt[: length + SIZE]) in chains:
        length += SIZE
    return length


def test_two_engines_answer_as_stock_and_count_by_engine(two, stock):
    found = complete_all(two.base, PROMPTS, rank_of=lambda number: number % 2)
    assert [text for text, _ in found] == stock
    start = dict.fromkeys(itertools.product(QUERIED, RANKS), 0)
    metrics = queried(two.base, start, sum(map(len, PROMPTS)))
    info = metrics.labels("vllm_radix:info")
    assert [labels["engine"] for labels in info] == ["0", "1"]
    assert {labels["patience"] for labels in info} == {"2.5"}
    for rank in RANKS:
        mine = [(p, c) for p, (_, c) in zip(PROMPTS, found, strict=True)][rank::2]
        asked = sum(len(prompt) for prompt, _ in mine)
        cached = sum(cached for _, cached in mine)
        assert metrics.of("vllm_radix:queried_tokens_total", rank) == asked
        assert metrics.of("vllm:prefix_cache_queries_total", rank) == asked
        assert metrics.of("vllm_radix:hit_tokens_total", rank) == cached
        assert metrics.of("vllm:prefix_cache_hits_total", rank) == cached > 0
        assert metrics.of("vllm_radix:pool_blocks", rank) == 41


def test_what_a_rank_stored_and_did_not_remove_is_what_it_finds(two):
    """What an independent subscriber holds is what the rank answers from."""
    removed, lengths = 0, set()
    for rank, port in zip(RANKS, two.ports, strict=True):
        prompts = few_shot(banks=6, questions=3, seed=f"held {rank}")
        random.Random(rank).shuffle(prompts)
        for prompt in prompts:
            expected = held(two.events.events(port), prompt)
            _, cached = complete(two.base, prompt, rank)
            # A hit may end inside the block after the last whole one.
            assert expected <= cached < expected + SIZE, (rank, expected, cached)
            lengths.add(expected)
            # What made room was told before, or in the same message.
            deadline = time.monotonic() + 30
            while held(two.events.events(port), prompt) < len(prompt) - SIZE:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert two.events.ranks(port) == {rank}
        names = [type(event).__name__ for event in two.events.events(port)]
        removed += names.count("BlockRemoved")
    assert removed > 0 and len(lengths) > 1


def test_a_router_sends_each_prompt_to_the_rank_that_holds_it(two):
    prompts = few_shot(banks=6, questions=1, seed="routed")
    for number, prompt in enumerate(prompts):
        complete(two.base, prompt, number % 2)
    two.events.settle(2)
    now = Metrics(two.base)
    before = {of: now.of(*of) for of in itertools.product(QUERIED, RANKS)}
    for rank in RANKS:
        mine = prompts[rank::2]
        for prompt in mine:
            found = [held(two.events.events(port), prompt) for port in two.ports]
            assert found[rank] > 300 and found[1 - rank] == 0
        for prompt in mine:
            complete(two.router.base, prompt)
        sent = sum(map(len, mine))
        after = queried(two.base, before, sent)
        grown = {of: after.of(*of) - count for of, count in before.items()}
        assert grown == {(n, r): sent * (r == rank) for n in QUERIED for r in RANKS}
        before = {of: after.of(*of) for of in before}


def test_the_doctor_finds_nothing_amiss_and_each_trap(two):
    def doctor(*words):
        command = [sys.executable, "-m", "vllm_radix.cli", "doctor", "--json"]
        command += ["--router", two.router.base, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        found = json.loads(done.stdout)["findings"]
        return done.returncode, {one["subject"]: one for one in found}

    code, found = doctor(*two.sources)
    assert code == 0 and {one["status"] for one in found.values()} == {"ok"}, found
    assert found["routing"]["found"].startswith("8 of 8 prompts")
    code, found = doctor(*two.sources[:2])
    assert code == 1
    assert found[f"events {two.base} rank 1"]["fix"].endswith("block-size 32")


def test_two_ranks_of_a_tensor_parallel_engine_answer_as_stock(model, tmp_path, stock):
    flags = ["--radix", "--tensor-parallel-size", "2", *SMALL]
    with serving(model, tmp_path / "log", *flags, seconds=SECONDS) as base:
        found = complete_all(base, PROMPTS)
        asked = sum(map(len, PROMPTS))
        metrics = wait_for(base, lambda page: page.of(QUERIED[1], 0) == asked)
    assert [text for text, _ in found] == stock
    assert [info["engine"] for info in metrics.labels("vllm_radix:info")] == ["0"]
    cached = sum(cached for _, cached in found)
    assert metrics.of("vllm_radix:hit_tokens_total", 0) == cached > 0
