"""Routing by what engines tell of their caches."""

from collections.abc import Sequence
from typing import Any, ClassVar

from vllm_radix.tree import encode
from vllm_radix_bench.routing.affinity import Affinity, Digest, following, root
from vllm_radix_bench.routing.base import EngineLoad


class Events(Affinity):
    """The engine that holds most of the prompt by its KV events, loads in balance.

    A mirror of each engine's cache, made of what engines publish at the end of each
    step: whole blocks, stored and removed. It knows what was evicted, and not what is
    being computed. It has the routers' thresholds. If no engine holds enough of the
    prompt, that with the fewest requests in flight is taken, of such ones that with
    the emptiest cache.
    """

    name: ClassVar = "events"
    like: ClassVar = "`--policy kv_aware` of vllm-router; Dynamo, llm-d"
    wants_events: ClassVar = True

    def __init__(self, num_engines: int, options: dict[str, float]) -> None:
        super().__init__(num_engines, options)
        self._block_size = 0
        # Of each engine: the digest of a hash, and how many blocks have it.
        self._known: list[dict[Any, tuple[Digest, int]]] = [
            {} for _ in range(num_engines)
        ]

    @property
    def chunk(self) -> int:
        """Tokens of a block; 1 before the first is told of."""
        return self._block_size or 1

    def fallback(self, engine: int, load: EngineLoad) -> tuple[int, int]:
        """Return an engine's load, then how much it holds."""
        return load.in_flight, self.holders.held[engine]

    def note_events(self, engine: int, events: Sequence[Any]) -> None:
        """Apply the events of a step to the engine's mirror: O(tokens stored)."""
        known = self._known[engine]
        for event in events:
            if hasattr(event, "token_ids"):
                self._store(engine, event)
            elif hasattr(event, "block_hashes"):
                for name in event.block_hashes:
                    digest, copies = known.pop(name)
                    if copies > 1:
                        known[name] = digest, copies - 1
                    else:
                        self.holders.remove(engine, digest)
            else:
                for digest, _ in known.values():
                    self.holders.remove(engine, digest)
                known.clear()

    def _store(self, engine: int, event: Any) -> None:
        known = self._known[engine]
        self._block_size = size = event.block_size
        extra = event.extra_keys
        # Of a whole block the first extra key is the salt: no other is in a replay.
        salt = extra[0][0] if extra and extra[0] else None
        parent = event.parent_block_hash
        digest = root(salt) if parent is None else known[parent][0]
        for at, name in enumerate(event.block_hashes):
            tokens = event.token_ids[at * size : (at + 1) * size]
            digest = following(digest, encode(tokens))
            copies = known[name][1] if name in known else 0
            known[name] = digest, copies + 1
            if not copies:
                self.holders.add(engine, digest)
