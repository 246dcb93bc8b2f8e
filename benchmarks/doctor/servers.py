"""The servers behind a router, and what each says of itself."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_radix.exits import CommandError
from vllm_radix_bench.ab.web import HttpError, get_json, post_json
from vllm_radix_bench.top.scrape import Page, address, scrape

_RANK_HEADER = "X-data-parallel-rank"


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
            HttpError: it does not answer, or is no server of a model.
        """
        try:
            model = get_json(f"{self.url}/v1/models", self.headers)["data"][0]
            self.model = str(model["id"])
            self.max_model_len = int(model.get("max_model_len") or 0)
        except (
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            ValueError,
            OverflowError,
        ) as error:
            raise HttpError("it names no model") from error
        try:
            page = scrape(address(self.url), time.monotonic())
        except CommandError:
            return
        self._read(page)

    def _read(self, page: Page) -> None:
        name = "vllm:cache_config_info"
        info = page.labels_of(name) or {}
        size = info.get("block_size", "")
        self.block_size = int(size) if size.isdecimal() else None
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


def told_by(router: str, headers: Mapping[str, str]) -> list[Server]:
    """Return the servers that a router of vLLM's knows.

    Raises:
        HttpError: it does not tell.
    """
    reply: Any = get_json(f"{router}/workers", headers)
    try:
        urls = [str(worker["url"]) for worker in reply["workers"]]
    except (KeyError, TypeError) as error:
        raise HttpError("the reply lists no workers") from error
    ranks: dict[str, list[int]] = {}
    for url in sorted(urls):
        base, _, rank = url.rpartition("@")
        if base and rank.isdecimal():
            ranks.setdefault(base, []).append(int(rank))
        else:
            ranks.setdefault(url, [])
    return [Server(url, tuple(sorted(of)), headers) for url, of in ranks.items()]
