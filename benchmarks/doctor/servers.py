"""The servers behind a router, and what each says of itself."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_radix.exits import CommandError
from vllm_radix_bench.ab.web import HttpError, get_json, post_json
from vllm_radix_bench.top.scrape import AddressError, Page, address, scrape

_RANK_HEADER = "X-data-parallel-rank"


class StrangeError(HttpError):
    """A server answers, but not as one of vLLM's; the message says how."""


@dataclass
class Server:
    """A server, as its router names it.

    Attributes:
        url: of its API.
        ranks: to which the router sends by themselves; empty where it sends to the
            server as one.
        headers: that each request carries.
        model: by which requests name it, once looked at.
        max_model_len: the longest request, in tokens, once looked at.
        block_size: of its cache, once looked at; None where metrics are not shown.
        engines: that it has, once looked at.
        radix: whether its metrics tell of radix, once looked at.
    """

    url: str
    ranks: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    max_model_len: int = 0
    block_size: int | None = None
    engines: int = 1
    radix: bool = False

    def look(self) -> None:
        """Learn what it says of itself.

        Raises:
            StrangeError: it is no server of a model.
            HttpError: it does not answer.
        """
        reply = get_json(f"{self.url}/v1/models", self.headers)
        try:
            model = reply["data"][0]
            name, longest = model["id"], model.get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise StrangeError("names no model") from error
        if not isinstance(name, str) or not name:
            raise StrangeError("names no model")
        if longest is not None and (type(longest) is not int or longest < 1):
            raise StrangeError(f"tells {longest!r:.80} as the max_model_len of {name}")
        self.model, self.max_model_len = name, longest or 0
        try:
            page = scrape(address(self.url), time.monotonic(), self.headers)
        except CommandError:
            return
        self._read(page)

    def _read(self, page: Page) -> None:
        name = "vllm:cache_config_info"
        size = (page.labels_of(name) or {}).get("block_size", "")
        known = size.isdecimal() and len(size) < 10
        self.block_size = int(size) or None if known else None
        self.engines = max(1, len(page.values_of("engine", name)))
        self.radix = page.labels_of("vllm_radix:info") is not None

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, as the router asks for them.

        Raises:
            HttpError: it does not tell.
        """
        body = {"model": self.model, "prompt": text}
        reply = post_json(f"{self.url}/v1/completions/render", body, self.headers)
        try:
            first = reply[0] if isinstance(reply, list) else reply
            return [*first["token_ids"]]
        except (KeyError, IndexError, TypeError) as error:
            raise HttpError("the reply holds no tokens") from error

    def complete(self, prompt: Sequence[int], rank: int | None) -> None:
        """Have one token computed after a prompt.

        Raises:
            HttpError: it refuses.
        """
        rank_header = {} if rank is None else {_RANK_HEADER: str(rank)}
        complete(self.url, self.model, prompt, {**self.headers, **rank_header})


def complete(
    url: str, model: str, prompt: Sequence[int], headers: Mapping[str, str]
) -> None:
    """Have one token computed after a prompt, by a server or through a router.

    Raises:
        HttpError: it is refused.
    """
    body = {"model": model, "prompt": [*prompt], "max_tokens": 1, "temperature": 0}
    post_json(f"{url}/v1/completions", body, headers, timeout=120)


def told_by(
    router: str, headers: Mapping[str, str]
) -> tuple[list[Server], list[object]]:
    """Return the servers that a router of vLLM's knows, and what it names besides.

    Raises:
        HttpError: it does not tell.
    """
    reply = get_json(f"{router}/workers", headers)
    workers = reply.get("workers") if isinstance(reply, dict) else None
    if not isinstance(workers, list):
        raise HttpError("the reply lists no workers")
    ranks: dict[str, set[int]] = {}
    strange: list[object] = []
    for worker in workers:
        named = worker.get("url") if isinstance(worker, dict) else worker
        text = named if isinstance(named, str) and "://" in named else "://"
        url, at, rank = text.rpartition("@")
        has_rank = bool(at) and rank.isdecimal() and len(rank) < 10
        try:
            url = base_of(url if has_rank else text)
        except AddressError:
            strange.append(named)
            continue
        ranks.setdefault(url, set()).update([int(rank)] if has_rank else [])
    servers = [Server(url, (*sorted(of),), headers) for url, of in ranks.items()]
    return sorted(servers, key=lambda server: server.url), strange


def base_of(text: str) -> str:
    """Return the address of a server, without a path, however it was written.

    Raises:
        AddressError: it is none.
    """
    return address(text).removesuffix("/metrics")
