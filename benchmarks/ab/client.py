"""Sends forests of turns to a server and times the answers.

A turn's prompt goes on from its parent's answer, so that conversations and agents are
closed loops, as they are in use. Prompts are token ids: the server's tokenizer cannot
make them other ones than those that were planned.
"""

import asyncio
import json
import random
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_radix_bench.ab.servers import Server
from vllm_radix_bench.workloads.turn import Turn

_OPEN_FILES = 65_535
_LONGEST_LINE = 1 << 24
"""Bytes: the first line of an answer repeats the prompt."""


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        id: path of its turn in the forest.
        tenant: of it; empty where that does not matter.
        ttft: seconds from sending to the first token; None if none came.
        tpot: seconds a token after the first; None with one token.
        e2e: seconds from sending to the end.
        sent: when it was sent, on any clock, if what sends it takes time of its own
            before it sends; None if not.
        prompt_tokens: of its prompt.
        output: token ids of its answer.
        top: for each token of it, the two likeliest and their log-probabilities, if
            asked for.
        error: why it failed; empty if it did not.
    """

    id: str
    tenant: str = ""
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    sent: float | None = None
    prompt_tokens: int = 0
    output: list[int] = field(default_factory=list)
    top: list[list[list[float]]] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Sending:
    """How requests are sent.

    Attributes:
        rate: roots a second, with random gaps; None sends them at their arrival.
        concurrency: trees of turns under way at once; None for no limit.
        seed: of the gaps.
        top_logprobs: to ask for.
        tenant_field: of ``vllm_xargs`` that names the tenant.
        with_priority: whether priorities are sent: only to servers that order by them.
    """

    rate: float | None = None
    concurrency: int | None = None
    seed: int = 0
    top_logprobs: int = 0
    tenant_field: str = "tenant"
    with_priority: bool = False


def allow_many_connections() -> None:
    """Raise the limit of open files: each request under way has one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def arrivals(roots: Sequence[Turn], sending: Sending) -> list[float]:
    """Return when each root is sent, in seconds after the start."""
    if sending.rate is None:
        return [root.arrival for root in roots]
    gaps = random.Random(f"arrivals {sending.seed}")
    at, out = 0.0, []
    for _ in roots:
        out.append(at)
        at += gaps.expovariate(sending.rate)
    return out


class Client:
    """Sends a forest to a server.

    Args:
        server: to send to.
        sending: how.
    """

    def __init__(self, server: Server, sending: Sending) -> None:
        self._server = server
        self._sending = sending
        self._answers: list[Answer] = []

    async def run(self, roots: Sequence[Turn]) -> list[Answer]:
        """Send all turns; return their answers, in the order in which they ended."""
        import aiohttp

        limit = self._sending.concurrency
        gate = asyncio.Semaphore(limit) if limit else None
        start = time.perf_counter()
        connector = aiohttp.TCPConnector(limit=0)
        # What hangs is the watch's to find; a slow server may take its time.
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers={**self._server.headers, "Content-Type": "application/json"},
            read_bufsize=_LONGEST_LINE,
        ) as self._session:
            times = arrivals(roots, self._sending)
            await asyncio.gather(
                *(
                    self._tree(root, str(number), start + at, gate)
                    for number, (root, at) in enumerate(zip(roots, times, strict=True))
                )
            )
        return self._answers

    async def _tree(
        self, root: Turn, name: str, at: float, gate: asyncio.Semaphore | None
    ) -> None:
        """Send a root at its time, and what follows its answer."""
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        if gate is None:
            await self._turn(root, [], name)
            return
        async with gate:
            await self._turn(root, [], name)

    async def _turn(self, turn: Turn, before: list[int], name: str) -> None:
        if turn.delay:
            await asyncio.sleep(turn.delay)
        prompt = list(turn.tokens) if turn.whole else [*before, *turn.tokens]
        answer = await self._ask(turn, prompt, name)
        self._answers.append(answer)
        if answer.error:
            # Its children have no answer to go on from.
            self._answers += lost(turn, name)
            return
        path = [*prompt, *answer.output]
        # Each child is a task, so that a long conversation is no deep stack.
        await asyncio.gather(
            *(
                self._turn(child, path, f"{name}.{number}")
                for number, child in enumerate(turn.children)
            )
        )

    def _body(self, turn: Turn, prompt: list[int]) -> dict[str, Any]:
        sending = self._sending
        body: dict[str, Any] = {
            "model": self._server.model_name,
            "prompt": prompt,
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if sending.top_logprobs:
            body["logprobs"] = sending.top_logprobs
            body["return_tokens_as_token_ids"] = True
        tenant = {sending.tenant_field: turn.tenant} if turn.tenant else {}
        if tenant or turn.hints:
            body["vllm_xargs"] = {**tenant, **turn.hints}
        if turn.salt is not None:
            body["cache_salt"] = turn.salt
        if sending.with_priority:
            body["priority"] = turn.priority
        return body

    async def _ask(self, turn: Turn, prompt: list[int], name: str) -> Answer:
        """Send a request; return its answer, with an error in it if it failed."""
        import aiohttp
        from aiohttp.http_exceptions import HttpProcessingError

        answer = Answer(name, turn.tenant, prompt_tokens=len(prompt))
        url = f"{self._server.base_url}/v1/completions"
        # Before the clock runs.
        body = json.dumps(self._body(turn, prompt)).encode()
        start = time.perf_counter()
        latest = start
        try:
            async with self._session.post(url, data=body) as reply:
                if reply.status != 200:
                    answer.error = _message(reply.status, await reply.text())
                    return answer
                async for raw in reply.content:
                    event = _event(raw)
                    if event is None:
                        continue
                    if "error" in event:
                        answer.error = str(event["error"])[:200]
                        return answer
                    choice = next(iter(event.get("choices", ())), None)
                    if choice and (tokens := choice.get("token_ids")):
                        latest = time.perf_counter()
                        if answer.ttft is None:
                            answer.ttft = latest - start
                        answer.output += tokens
                        answer.top += _top(choice.get("logprobs"))
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:200]
            return answer
        if answer.ttft is None:
            answer.error = "no token came"
            return answer
        answer.e2e = latest - start
        if len(answer.output) > 1:
            answer.tpot = (answer.e2e - answer.ttft) / (len(answer.output) - 1)
        return answer


def lost(turn: Turn, name: str) -> Iterable[Answer]:
    """Yield the answers that a failed turn's descendants do not have."""
    stack = [(name, turn)]
    while stack:
        above, parent = stack.pop()
        for number, child in enumerate(parent.children):
            path = f"{above}.{number}"
            yield Answer(path, child.tenant, error="the turn before it failed")
            stack.append((path, child))


def _event(raw: bytes) -> dict[str, Any] | None:
    """Return the object of a line of server-sent events; None if it has none."""
    text = raw.decode(errors="replace").strip()
    if not text.startswith("data:"):
        return None
    text = text.removeprefix("data:").strip()
    if text == "[DONE]":
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return {"error": f"the server sent {text[:80]!r}"}
    return event if isinstance(event, dict) else None


def _message(status: int, text: str) -> str:
    try:
        body = json.loads(text)
        said = body.get("error", body).get("message", text)
    except (ValueError, AttributeError):
        said = text
    return f"HTTP status {status}: {str(said)[:200]}"


def _top(logprobs: Mapping[str, Any] | None) -> list[list[list[float]]]:
    """Return the two likeliest tokens of each step, with their log-probabilities."""
    out = []
    for step in (logprobs or {}).get("top_logprobs") or []:
        ranked = sorted(step.items(), key=lambda item: -item[1])[:2]
        out.append([[int(name.rpartition(":")[2]), value] for name, value in ranked])
    return out
