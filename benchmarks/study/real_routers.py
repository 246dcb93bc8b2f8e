"""What two real engines compute behind real routers, on few-shot traffic.

    python -m vllm_radix_bench.study.real_routers .models/tiny

Starts one server of two data-parallel engines for each arm, or with ``--separate`` two
servers, and sends the same prompts through each routing, from an empty cache. Tokens
computed are counts, but for which request comes first when clients send at once:
``--repeats`` shows what that moves.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_radix.exits import CommandError, ExitCode, say_why
from vllm_radix_bench.ab.scrape import scrape
from vllm_radix_bench.ab.servers import (
    ARMS,
    HOST,
    Server,
    ServerSpec,
    free_port,
    radix_words,
    running,
)
from vllm_radix_bench.ab.web import HttpError, get, post_json
from vllm_radix_bench.report.output import OutputFile
from vllm_radix_bench.study.vllm_router import RouterError, running_router

RANKS = 2
BLOCK_SIZE = 32
BANK_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 310, 18, 4
_READY_SECONDS = 900.0
_OPTIONS = (
    "--load-format dummy --dtype float32 --enforce-eager --max-model-len 1024 "
    f"--max-num-seqs 8 --block-size {BLOCK_SIZE} --enable-scale-out"
).split()
ORDERS = ("random", "in turn", "by bank")
"""Orders of the prompts: any, a question to each bank, all questions to a bank."""
DIRECT, BY_BANK = "vLLM's balancer", "equal placement"
POLICIES = {
    "round_robin": ("round_robin",),
    "cache_aware": ("cache_aware",),
    "cache_aware, 4": ("cache_aware", "--balance-abs-threshold", "4"),
    "kv_aware": ("kv_aware",),
}
"""Policies of vllm-router, and their options: cache_aware rebalances from a difference
of 64 requests on, which eight clients never reach, and from 4 on."""


@dataclass(frozen=True)
class Row:
    """What one run of the load counted.

    Attributes:
        arm: ``stock`` or ``radix``.
        routing: how requests were placed.
        prompt_tokens: that were sent.
        computed: of them, those that were found in no cache.
        requests: that each engine served.
    """

    arm: str
    routing: str
    prompt_tokens: int
    computed: int
    requests: tuple[int, ...]


def load(
    banks: int, questions: int, seed: int, order: str = ORDERS[0]
) -> list[tuple[int, list[int]]]:
    """Return prompts in the order in which they are sent, each with its bank.

    Args:
        banks: of examples.
        questions: to each bank.
        seed: of all words, and of a random order.
        order: one of ``ORDERS``.
    """
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(10, 9000) for _ in range(count)]

    texts = [words(BANK_TOKENS) for _ in range(banks)]
    prompts = [
        (bank, text + words(QUESTION_TOKENS))
        for _ in range(questions)
        for bank, text in enumerate(texts)
    ]
    if order == "random":
        rng.shuffle(prompts)
    elif order == "by bank":
        prompts.sort(key=lambda prompt: prompt[0])
    return prompts


class Deployment:
    """Two engines of an arm.

    Args:
        arm: that they serve.
        servers: one with two engines, or two.
        events: port of each engine's events.
    """

    def __init__(self, arm: str, servers: Sequence[Server], events: Sequence[int]):
        self.arm, self.servers, self._events = arm, servers, events

    @property
    def separate(self) -> bool:
        """Whether each engine is a server of its own."""
        return len(self.servers) > 1

    def router_words(self, policy: Sequence[str]) -> list[str]:
        """Return the options of the router for a policy."""
        urls = [server.base_url for server in self.servers]
        words = ["--worker-urls", *urls, "--policy", *policy]
        if not self.separate:
            words += ["--intra-node-data-parallel-size", str(RANKS)]
        if policy[0] != "kv_aware":
            return words
        ends = [f"tcp://{HOST}:{port}" for port in self._events]
        named = ends if self.separate else [",".join(ends)]
        for url, endpoints in zip(urls, named, strict=True):
            words += ["--kv-event-source", f"{url}={endpoints}"]
        words += ["--kv-event-block-size", str(BLOCK_SIZE)]
        return [*words, "--kv-event-model", self.servers[0].model_name]

    def place(self, bank: int) -> tuple[str, dict[str, str]]:
        """Return where a bank's requests go, placed equally, and with which header."""
        if self.separate:
            return self.servers[bank % RANKS].base_url, {}
        header = {"X-data-parallel-rank": str(bank % RANKS)}
        return self.servers[0].base_url, header

    def counted(self) -> Counter[str]:
        """Return prompt tokens, hits, and the requests of each engine so far."""
        found: Counter[str] = Counter()
        for number, server in enumerate(self.servers):
            page = scrape(server)
            found["prompt"] += int(page.sums.get("vllm:prompt_tokens_total", 0))
            found["hits"] += int(page.sums.get("vllm:prefix_cache_hits_total", 0))
            for engine, requests in _requests(server).items():
                found[f"engine {number if self.separate else engine}"] += requests
        return found

    def run(
        self, routing: str, prompts: Sequence[tuple[int, list[int]]], clients: int
    ) -> Row:
        """Send the load once, from an empty cache.

        Raises:
            CommandError: a server or the router failed.
        """
        for server in self.servers:
            server.reset_cache()
        before = self.counted()
        with ExitStack() as stack:
            base = self.servers[0].base_url
            if routing in POLICIES:
                words = self.router_words(POLICIES[routing])
                base = stack.enter_context(running_router(words)).base
            model = self.servers[0].model_name

            def send(one: tuple[int, list[int]]) -> None:
                bank, prompt = one
                url, headers = self.place(bank) if routing == BY_BANK else (base, {})
                body = {"model": model, "prompt": prompt, "temperature": 0}
                body |= {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
                post_json(f"{url}/v1/completions", body, headers, timeout=600)

            with ThreadPoolExecutor(clients) as pool:
                try:
                    list(pool.map(send, prompts))
                except HttpError as error:
                    said = f"{routing}: a request failed ({error})"
                    raise RouterError(said) from error
        expected = sum(len(prompt) for _, prompt in prompts)
        return self._row(routing, before, expected)

    def _row(self, routing: str, before: Counter[str], expected: int) -> Row:
        """Return what was counted since; the last step's counts come a moment later."""
        deadline = time.monotonic() + 30
        grown = self.counted() - before
        while grown["prompt"] < expected and time.monotonic() < deadline:
            time.sleep(0.2)
            grown = self.counted() - before
        requests = tuple(grown[f"engine {rank}"] for rank in range(RANKS))
        computed = grown["prompt"] - grown["hits"]
        return Row(self.arm, routing, grown["prompt"], computed, requests)


def _requests(server: Server) -> Counter[int]:
    """Return how many requests each engine of a server has finished."""
    from vllm_radix_bench.top.scrape import Page

    page = Page(get(f"{server.base_url}/metrics").decode())
    name = "vllm:request_success_total"
    engines = page.values_of("engine", name)
    return Counter({int(e): int(page.sum(name, engine=e) or 0) for e in engines})


@contextmanager
def deployed(
    arm: str, model: str, blocks: int, separate: bool, logs: Path
) -> Iterator[Deployment]:
    """Start an arm's engines; end them in any case."""
    events = [free_port()]
    events.append(free_port() if separate else events[0] + 1)
    with ExitStack() as stack:
        servers = []
        for number in range(RANKS if separate else 1):
            config = {"enable_kv_cache_events": True, "publisher": "zmq"}
            config["endpoint"] = f"tcp://*:{events[number]}"
            options = [*_OPTIONS, "--num-gpu-blocks-override", str(blocks + 1)]
            options += ["--kv-events-config", json.dumps(config)]
            if not separate:
                options += ["--data-parallel-size", str(RANKS)]
                options += ["--api-server-count", "1"]
            if arm == "radix":
                options += radix_words({})
            spec = ServerSpec(arm, model, tuple(options))
            log = logs.with_name(f"{logs.name}-{number}")
            servers.append(stack.enter_context(running(spec, log, _READY_SECONDS)))
        yield Deployment(arm, servers, events)


def text_table(rows: Sequence[Row]) -> str:
    """Return the tokens computed of each routing, stock → radix, as Markdown."""
    lines = ["| routing | tokens computed | requests of each engine |", "|---|---|---|"]
    for routing in dict.fromkeys(row.routing for row in rows):
        cells, placed = [], []
        for arm in ARMS:
            found = [r for r in rows if (r.routing, r.arm) == (routing, arm)]
            if found:
                counts = sorted(row.computed for row in found)
                least, most = (f"{count:,}" for count in (counts[0], counts[-1]))
                cells.append(least if least == most else f"{least}-{most}")
                placed.append("/".join(map(str, found[0].requests)))
        lines.append(f"| {routing} | {' → '.join(cells)} | {' → '.join(placed)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="folder of the model")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--routings", nargs="+", choices=[DIRECT, *POLICIES, BY_BANK])
    parser.add_argument("--separate", action="store_true", help="two servers")
    parser.add_argument("--banks", type=int, default=6)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=41, help="of each engine")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    routings = arguments.routings or [
        name
        for name in (DIRECT, *POLICIES, BY_BANK)
        if name != DIRECT or not arguments.separate
    ]
    output = arguments.output and OutputFile(arguments.output)
    if output:
        output.prepare()
    words = arguments.banks, arguments.questions, arguments.seed
    prompts = load(*words, arguments.order)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in arguments.arms:
            where = Path(folder) / arm
            with deployed(
                arm, arguments.model, arguments.blocks, arguments.separate, where
            ) as deployment:
                for routing in routings:
                    for _ in range(arguments.repeats):
                        rows.append(deployment.run(routing, prompts, arguments.clients))
                        print(rows[-1], file=sys.stderr, flush=True)
    print(text_table(rows))
    if output:
        output.write_json(_record(arguments, rows))
    return ExitCode.GOOD


def _record(arguments: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what is kept of a run: the load, the versions and the counts."""
    names = ["separate", "banks", "questions", "order", "blocks", "clients"]
    names += ["repeats", "seed"]
    return {
        "command": "python -m vllm_radix_bench.study.real_routers",
        "versions": {name: _version(name) for name in ("vllm", "vllm-router")},
        "load": {name: getattr(arguments, name) for name in names},
        "rows": [asdict(row) for row in rows],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, KeyboardInterrupt) as error:
        sys.exit(say_why("real_routers", error, debug=False))
