"""Routing by a hash of how a prompt begins."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar

from vllm_radix.tree import encode
from vllm_radix_bench.routing.base import EngineLoad, Routing, RoutingOption


class PrefixHash(Routing):
    """The engine that a hash of the first tokens names, whatever its load.

    Rendezvous hashing: each engine has a hash of its own with the beginning of the
    prompt, and the highest wins, so that one engine more moves few prefixes.
    """

    name: ClassVar = "prefix-hash"
    like: ClassVar = "consistent hashing in a load balancer; `prefix_hash` of routers"
    options: ClassVar = {
        "tokens": RoutingOption(256, 1, 1_000_000, "of the prompt that are hashed")
    }

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        super().__init__(num_engines, options)
        self._tokens = int(options["tokens"])

    def choose(
        self, prompt: Sequence[int], salt: str | None, loads: Sequence[EngineLoad]
    ) -> int:
        """Return the engine with the highest hash: O(tokens hashed + engines)."""
        begin = encode(prompt[: self._tokens]) + (salt or "").encode()
        key = blake2b(begin, digest_size=16).digest()

        def weight(engine: int) -> bytes:
            return blake2b(key + engine.to_bytes(4, "big"), digest_size=8).digest()

        return max(range(self.num_engines), key=weight)
