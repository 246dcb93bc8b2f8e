"""What is sent in an A/B: one registry of ways to make and send requests."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from vllm_radix_bench.ab.client import Answer, Client, Sending
from vllm_radix_bench.ab.guidellm import GuideLLM
from vllm_radix_bench.ab.serve_options import check_bench
from vllm_radix_bench.ab.servers import HOST, Server, ServerError
from vllm_radix_bench.replay.cache_keys import CacheKeys
from vllm_radix_bench.replay.oracles import infinite_cache
from vllm_radix_bench.traces.formats.recorded import FILL
from vllm_radix_bench.traces.hashed_prompt import HashedPrompt
from vllm_radix_bench.workloads.builders import BUILDERS
from vllm_radix_bench.workloads.turn import Turn, Workload

_BENCH_PREFIX = "vllm_radix_bench.ab.bench_worker"


class Load(Protocol):
    """Requests, and how they are sent.

    Attributes:
        kind: of the load, in the report.
        name: of it, which tells it apart from others in a run.
        what: what its requests are, in a sentence.
        is_control: whether nothing is shared.
    """

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """Return the name that tells it apart from others in a run."""
        ...

    @property
    def what(self) -> str:
        """Return what its requests are, in a sentence."""
        ...

    @property
    def is_control(self) -> bool:
        """Whether nothing is shared."""
        ...

    @property
    def fewest_tokens(self) -> int | None:
        """The fewest prompt tokens that any cache computes; None if not known."""
        ...

    async def send(self, server: Server, sending: Sending) -> list[Answer]:
        """Send all requests to a server; return their answers."""
        ...

    def close(self) -> None:
        """End what was started to send."""
        ...


class ProgramLoad(Load, Protocol):
    """Requests that another program makes, by options of its own."""

    def __init__(self, words: tuple[str, ...], log: Path, tokenizer: str) -> None:
        """Take its options, a file for what it prints, and the tokenizer."""

    @classmethod
    def check(
        cls, words: Sequence[str], arguments: argparse.Namespace, tokenizer: str
    ) -> dict[str, str]:
        """Check its options, before a server starts.

        Args:
            words: its options.
            arguments: of ab.
            tokenizer: folder or name.

        Returns:
            Versions that a result depends on, by name.

        Raises:
            InputError: one is wrong, or ab's to choose.
        """
        ...


@dataclass
class Forest:
    """Turns that the project's own client sends.

    Attributes:
        kind: ``built-in`` or ``trace``.
        name: of the load.
        what: what its requests are.
        roots: the turns.
        is_control: whether nothing is shared.
        keys: what caches may tell prompts apart by, besides salts apart.
    """

    kind: str
    name: str
    what: str
    roots: Sequence[Turn]
    is_control: bool = False
    keys: Sequence[CacheKeys] = ()

    def __post_init__(self) -> None:
        self.fewest_tokens: int | None = min(
            infinite_cache(self.roots, by) for by in (None, *self.keys)
        )

    def some(self, count: int) -> "Forest":
        """Return a load of the first roots only, to warm a server."""
        return replace(self, roots=self.roots[:count])

    async def send(self, server: Server, sending: Sending) -> list[Answer]:
        """Send all turns to a server; return their answers."""
        return await Client(server, sending).run(self.roots)

    def close(self) -> None:
        """Do nothing: nothing was started."""


def built_in(work: Workload) -> Forest:
    """Return the load of a built-in workload."""
    about = (BUILDERS[work.name].__doc__ or "").strip().rstrip(".")
    what = f"{about}; the working set is {work.pressure:.1f} times the cache"
    return Forest("built-in", work.name, what, work.roots, work.name == "control")


def in_vocabulary(roots: Sequence[Turn], vocabulary: int) -> list[Turn]:
    """Return turns whose tokens a model knows; what was shared still is.

    Made-up blocks of hashed traces, and what recorded requests brought, become tokens
    drawn from their numbers. Two of them begin alike by chance once in a vocabulary,
    and go on alike hardly ever.

    Args:
        roots: of a trace.
        vocabulary: tokens of the model.
    """
    drawn: dict[tuple[int, int], list[int]] = {}
    # The lowest ids are often special.
    low = min(1000, vocabulary // 2)

    def block(first: int, size: int) -> list[int]:
        key = first, size
        if key not in drawn:
            rng = np.random.default_rng(first)
            drawn[key] = rng.integers(low, vocabulary, size).tolist()
        return drawn[key]

    def known(tokens: Sequence[int]) -> Sequence[int]:
        if isinstance(tokens, HashedPrompt):
            size = tokens.hashed_tokens
            out: list[int] = []
            for first in tokens.firsts:
                out += block(first, size)
            return out[: len(tokens)]
        if max(tokens, default=0) < vocabulary:
            return tokens
        return _drawn(list(tokens), low, vocabulary)

    def turned(turn: Turn) -> Turn:
        return replace(turn, tokens=known(turn.tokens), children=[])

    out = [turned(root) for root in roots]
    stack = list(zip(roots, out, strict=True))
    while stack:
        old, new = stack.pop()
        new.children = [turned(child) for child in old.children]
        stack += zip(old.children, new.children, strict=True)
    return out


def _drawn(tokens: Sequence[int], low: int, vocabulary: int) -> list[int]:
    """Return tokens that a model knows; those that were made up are drawn.

    Each token beyond the vocabulary begins a row that is drawn from its number, which
    ``FILL`` goes on with: equal rows stay equal, and others are others throughout.
    """
    out: list[int] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        end = at + 1
        if token >= vocabulary:
            while end < len(tokens) and tokens[end] == FILL:
                end += 1
            rng = np.random.default_rng(token)
            out += rng.integers(low, vocabulary, end - at).tolist()
        else:
            out.append(token)
        at = end
    return out


@dataclass
class Bench:
    """The requests of ``vllm bench serve``, sent by it.

    Attributes:
        words: its options.
        log: file for what it prints.
        tokenizer: folder or name.
    """

    words: tuple[str, ...]
    log: Path
    tokenizer: str
    kind: ClassVar[str] = "bench"
    is_control: ClassVar[bool] = False
    fewest_tokens: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def check(
        cls, words: Sequence[str], arguments: argparse.Namespace, tokenizer: str
    ) -> dict[str, str]:
        """Check its options; there is no version to tell but vLLM's.

        Raises:
            InputError: it refuses one, or one is ab's to choose.
        """
        check_bench(words)
        return {}

    @property
    def name(self) -> str:
        """Return the data set's name."""
        words = [word for one in self.words for word in one.split("=", 1)]
        if "--dataset-name" in words[:-1]:
            return f"bench: {words[words.index('--dataset-name') + 1]}"
        return "bench"

    @property
    def what(self) -> str:
        """Return the options as they were given."""
        return "vllm bench serve " + " ".join(self.words)

    def _worker(self) -> "subprocess.Popen[str]":
        """Return the process that sends; it is started once."""
        if self._process is None:
            reading, writing = os.pipe()
            with self.log.open("w") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _BENCH_PREFIX, str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    text=True,
                    start_new_session=True,
                    env=_bench_environment(),
                )
            os.close(writing)
            self._replies = os.fdopen(reading)
        return self._process

    def _ask(self, words: Sequence[str]) -> dict[str, Any]:
        worker = self._worker()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(list(words)) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # the reply, or its absence, tells
        line = self._replies.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"failure": "it ended"}
        if "failure" in reply:
            raise ServerError(
                f"vllm bench serve failed ({reply['failure']}); its log is {self.log}"
            )
        return reply

    async def send(self, server: Server, sending: Sending) -> list[Answer]:
        """Let vLLM send all requests; return their answers."""
        words = [*self.words, "--base-url", server.base_url]
        words += ["--model", server.spec.model, "--tokenizer", self.tokenizer]
        words += ["--served-model-name", server.model_name, "--disable-tqdm"]
        words += ["--save-detailed", "--ready-check-timeout-sec", "0"]
        for name, value in server.headers.items():
            pair = f"{name}={value}"
            if "--header" in words:  # it takes all pairs at once
                words.insert(words.index("--header") + 1, pair)
            else:
                words += ["--header", pair]
        for option, given in (
            ("--request-rate", sending.rate),
            ("--max-concurrency", sending.concurrency),
            ("--seed", sending.seed),
            ("--temperature", 0),
        ):
            if given is not None and not self._has(option):
                words += [option, str(given)]
        try:
            result = await asyncio.to_thread(self._ask, words)
        except asyncio.CancelledError:
            self.close()
            raise
        return answers_of(result)

    def _has(self, option: str) -> bool:
        return any(word.split("=")[0] == option for word in self.words)

    def close(self) -> None:
        """End the process that sends."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _bench_environment() -> dict[str, str]:
    """Return the environment of vLLM's bench: no plugin, and no proxy to a server here.

    Some of its data sets draw by the hash of strings.
    """
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST)))
    fixed = {"PYTHONHASHSEED": "0", "VLLM_PLUGINS": ""}
    return {**os.environ, **fixed, "NO_PROXY": direct, "no_proxy": direct}


def answers_of(result: Mapping[str, Any]) -> list[Answer]:
    """Return the answers in a result of ``vllm bench serve``.

    Their outputs are characters' numbers, not tokens: equal texts are equal lists.
    """
    out = []
    fields = ("start_times", "ttfts", "itls", "input_lens", "output_lens")
    texts = zip(result["generated_texts"], result["errors"], strict=True)
    rows = zip(*(result[name] for name in fields), texts, strict=True)
    for number, (sent, ttft, itls, length, tokens, said) in enumerate(rows):
        text, error = said
        answer = Answer(str(number), prompt_tokens=length, error=error or "")
        if not answer.error:
            answer.sent, answer.ttft, answer.e2e = sent, ttft, ttft + sum(itls)
            # A piece of the stream may hold several tokens.
            answer.tpot = sum(itls) / (tokens - 1) if tokens > 1 else None
            answer.output = [ord(character) for character in text]
        out.append(answer)
    return out


LOADS: dict[str, type[ProgramLoad]] = {"bench": Bench, "guidellm": GuideLLM}
"""Loads made from the words after ``--``, by the names that ``--load`` takes."""
