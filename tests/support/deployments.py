"""More than one engine, for tests: few-shot traffic, KV events and a real router."""

import json
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import msgspec
import zmq
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)

from support.servers import NAME, free_port
from vllm_radix_bench.study.vllm_router import running_router


class _Batch(KVEventBatch):
    """As vLLM's, with the events typed, so that they are decoded."""

    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def with_weights(source, folder):
    """Return a copy of a model's folder, with weights drawn once, that matter.

    Those that vLLM makes up depend on how a layer is cut among ranks, and are so small
    that an answer depends on the last token alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    shutil.copytree(source, folder)
    config = AutoConfig.from_pretrained(source, initializer_range=0.1)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def few_shot(banks, questions, bank_tokens=310, seed=0):
    """Return prompts: questions after banks of examples, bank by bank in turn."""
    rng = random.Random(seed)

    def words(length):
        return [rng.randrange(10, 9000) for _ in range(length)]

    texts = [words(bank_tokens) for _ in range(banks)]
    return [text + words(18) for _ in range(questions) for text in texts]


def complete(base, prompt, rank=None, **more):
    """Return the text and the cached tokens of a greedy completion.

    Tokens are not asked for: vllm-router looks up no request that does.
    """
    body = {"model": NAME, "prompt": prompt, "max_tokens": 4}
    body |= {"temperature": 0, "ignore_eos": True, **more}
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    reply = httpx.post(
        f"{base}/v1/completions", json=body, headers=headers, timeout=300
    )
    assert reply.status_code == 200, reply.text
    choice, usage = reply.json()["choices"][0], reply.json()["usage"]
    return choice["text"], usage["prompt_tokens_details"]["cached_tokens"]


def complete_all(base, prompts, clients=8, rank_of=None):
    """Return text and cached tokens of each prompt, sent by some clients at once."""
    ranks = [rank_of and rank_of(number) for number in range(len(prompts))]
    with ThreadPoolExecutor(clients) as pool:
        sent = pool.map(
            lambda one: complete(base, *one), zip(prompts, ranks, strict=True)
        )
        return [*sent]


def as_texts(prompts):
    """Return prompts of text: the numbers of tokens, written out."""
    return [" ".join(map(str, tokens)) for tokens in prompts]


def publish_events(port):
    """Return the option with which rank r publishes at ``port`` + r."""
    config = {"enable_kv_cache_events": True, "publisher": "zmq"}
    # With a host instead of the star, vLLM connects to it, and does not listen.
    config["endpoint"] = f"tcp://*:{port}"
    return ("--kv-events-config", json.dumps(config))


def free_ports(count):
    """Return the first of some ports in a row that nothing listens on."""
    import socket

    while True:
        first = free_port()
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


class Subscriber:
    """Keeps the KV events of some endpoints, as vLLM's own types.

    It shares no code with the project: what it holds is what a router would hold.
    """

    def __init__(self, ports):
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._context = zmq.Context()
        self.batches = {port: [] for port in ports}
        self._sockets = {}
        for port in ports:
            socket = self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(f"tcp://127.0.0.1:{port}")
            self._sockets[socket] = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def _listen(self):
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while not self._stop.is_set():
            for socket, _ in poller.poll(100):
                topic, number, payload = socket.recv_multipart()
                assert topic == b""
                batch = self._decoder.decode(payload)
                number = int.from_bytes(number, "big")
                self.batches[self._sockets[socket]].append((number, batch, payload))

    def __enter__(self):
        self._thread.start()
        # After which the publishers know of it.
        time.sleep(0.5)
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def settle(self, seconds=1.0):
        """Wait until nothing has come for a time."""
        count = -1
        while count != (count := sum(map(len, self.batches.values()))):
            time.sleep(seconds)

    def events(self, port):
        """Return the events of an endpoint; its batches are complete and in order."""
        numbers = [number for number, _, _ in self.batches[port]]
        first = numbers[0] if numbers else 0
        assert numbers == [*range(first, first + len(numbers))]
        return [event for _, batch, _ in self.batches[port] for event in batch.events]

    def ranks(self, port):
        """Return the ranks that an endpoint's batches name."""
        return {batch.data_parallel_rank for _, batch, _ in self.batches[port]}

    def payloads(self, port):
        return [payload for _, _, payload in self.batches[port]]


def resident(events):
    """Return the chains of tokens of blocks that were stored and not removed."""
    chain, stored = {None: ()}, set()
    for event in events:
        if isinstance(event, BlockStored):
            parent, size = event.parent_block_hash, event.block_size
            for number, name in enumerate(event.block_hashes):
                tokens = event.token_ids[number * size : (number + 1) * size]
                assert len(tokens) == size and name not in stored
                chain[name] = (*chain[parent], *tokens)
                stored.add(name)
                parent = name
        elif isinstance(event, BlockRemoved):
            stored -= {*event.block_hashes} & stored
        else:
            stored.clear()
    return {chain[name] for name in stored}


class Router:
    """A running router."""

    def __init__(self, running):
        self.base, self._metrics = running.base, running.metrics

    def metric(self, name):
        """Return a counter, summed."""
        lines = httpx.get(self._metrics).text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(name) and not line.startswith("#")
        )


@contextmanager
def routing(log, policy, urls, *flags):
    """Run vllm-router before servers; yield it once it is ready."""
    words = ["--policy", policy, "--worker-urls", *urls, *flags]
    with running_router(words, log) as running:
        yield Router(running)
