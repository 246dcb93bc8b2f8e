"""Routing to where a prefix is, unless loads differ too much.

What is thought to be where is a chain of digests: that of a chunk of tokens has in it
that of the chunk before, so that equal digests are equal prefixes.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import ClassVar

from vllm_radix.tree import BYTES_PER_TOKEN, encode
from vllm_radix_bench.routing.base import EngineLoad, Routing, RoutingOption

Digest = bytes


def root(salt: str | None) -> Digest:
    """Return the digest that chains of a salt begin with."""
    return blake2b((salt or "").encode(), digest_size=16).digest()


def following(before: Digest, chunk: bytes) -> Digest:
    """Return the digest of a chunk after others: O(chunk)."""
    return blake2b(before + chunk, digest_size=16).digest()


def chain(prompt: Sequence[int], salt: str | None, size: int) -> Iterator[Digest]:
    """Yield the digests of the whole chunks of a prompt: O(prompt).

    Args:
        prompt: its tokens.
        salt: of its cache.
        size: tokens of a chunk.
    """
    key, digest, step = encode(prompt), root(salt), size * BYTES_PER_TOKEN
    for at in range(0, len(key) - step + 1, step):
        digest = following(digest, key[at : at + step])
        yield digest


class Holders:
    """Which engines are thought to hold which chunks.

    Args:
        num_engines: how many there are.

    Attributes:
        held: chunks of each engine.
    """

    def __init__(self, num_engines: int) -> None:
        self.held = [0] * num_engines
        # A bit for each engine, so that all are looked up at once.
        self._bits: dict[Digest, int] = {}
        self._all = (1 << num_engines) - 1

    def __len__(self) -> int:
        return len(self._bits)

    def add(self, engine: int, digest: Digest) -> None:
        """Note that an engine holds a chunk; it did not before."""
        self._bits[digest] = self._bits.get(digest, 0) | 1 << engine
        self.held[engine] += 1

    def remove(self, engine: int, digest: Digest) -> None:
        """Note that an engine that held a chunk does so no longer."""
        left = self._bits[digest] & ~(1 << engine)
        if left:
            self._bits[digest] = left
        else:
            del self._bits[digest]
        self.held[engine] -= 1

    def longest(self, digests: Sequence[Digest]) -> tuple[int, int]:
        """Return how many chunks are held at most, and the engines, as bits.

        O(chunks).
        """
        engines = self._all
        for depth, digest in enumerate(digests):
            still = engines & self._bits.get(digest, 0)
            if not still:
                return depth, engines
            engines = still
        return len(digests), engines


class Affinity(Routing):
    """The engine that holds the longest part of the prompt, with loads in balance.

    The rule of cache-aware routers: when the busiest engine has `spread` requests more
    in flight than the idlest one, and `factor` times as many, the idlest one is taken.
    Else the engine that holds the longest part of the prompt is taken if that is more
    than `match` of it; and else that with the least `fallback`.
    """

    options: ClassVar = {
        "match": RoutingOption(0.3, 0, 1, "share of the prompt that must be held"),
        "spread": RoutingOption(64, 0, 1_000_000, "requests between most and fewest"),
        "factor": RoutingOption(1.5, 1, 1000, "between most and fewest requests"),
    }

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        super().__init__(num_engines, options)
        self._match = options["match"]
        self._spread = options["spread"]
        self._factor = options["factor"]
        self.holders = Holders(num_engines)

    @property
    @abstractmethod
    def chunk(self) -> int:
        """Tokens of a chunk."""

    @abstractmethod
    def fallback(self, engine: int, load: EngineLoad) -> tuple[int, int]:
        """Return by what an engine is chosen if none holds enough."""

    def note_choice(self, engine: int, digests: Sequence[Digest]) -> None:
        """Note what was sent to an engine."""

    def choose(
        self, prompt: Sequence[int], salt: str | None, loads: Sequence[EngineLoad]
    ) -> int:
        """Return the engine: O(prompt + engines)."""
        digests = list(chain(prompt, salt, self.chunk))
        chosen = self._chosen(len(prompt), digests, loads)
        self.note_choice(chosen, digests)
        return chosen

    def _chosen(
        self, tokens: int, digests: Sequence[Digest], loads: Sequence[EngineLoad]
    ) -> int:
        counts = [load.in_flight for load in loads]
        most, fewest = max(counts), min(counts)
        if most - fewest > self._spread and most > self._factor * fewest:
            return self.least(counts.__getitem__)
        depth, engines = self.holders.longest(digests)
        if depth and depth * self.chunk > self._match * tokens:
            # Of those that hold as much, the idlest.
            return self.least(lambda e: (not engines >> e & 1, counts[e]))
        return self.least(lambda e: self.fallback(e, loads[e]))
