"""Routing by what was sent where."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from vllm_radix_bench.routing.affinity import Affinity, Digest
from vllm_radix_bench.routing.base import EngineLoad, RoutingOption


class History(Affinity):
    """The engine to which most of the prompt was sent before, with loads in balance.

    An approximate tree of what was sent to each engine, as cache-aware routers keep it:
    engines tell nothing. It has the routers' thresholds. What was not sent for longest
    is forgotten beyond `memory` tokens an engine. If no engine was sent enough of the
    prompt, that with the smallest tree is taken.
    """

    name: ClassVar = "history"
    like: ClassVar = (
        "`--policy cache_aware` of vllm-router, SGLang's router, Ray's "
        "`PrefixCacheAffinityRouter`"
    )
    options: ClassVar = Affinity.options | {
        "memory": RoutingOption(4_000_000, 16, 1e9, "tokens remembered of an engine"),
        "chunk": RoutingOption(16, 1, 4096, "tokens that are one step of the tree"),
    }

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        super().__init__(num_engines, options)
        self._chunk = int(options["chunk"])
        self._most = max(1, int(options["memory"]) // self._chunk)
        self._sent: list[OrderedDict[Digest, None]] = [
            OrderedDict() for _ in range(num_engines)
        ]

    @property
    def chunk(self) -> int:
        """Tokens of a step of the tree."""
        return self._chunk

    def fallback(self, engine: int, load: EngineLoad) -> tuple[int, int]:
        """Return the size of an engine's tree, then its load."""
        return self.holders.held[engine], load.in_flight

    def note_choice(self, engine: int, digests: Sequence[Digest]) -> None:
        """Remember a prompt; forget the ends of those not sent for longest."""
        sent = self._sent[engine]
        # The beginning last: it is forgotten last.
        for digest in reversed(digests):
            if digest in sent:
                sent.move_to_end(digest)
            else:
                sent[digest] = None
                self.holders.add(engine, digest)
        while len(sent) > self._most:
            self.holders.remove(engine, sent.popitem(last=False)[0])
