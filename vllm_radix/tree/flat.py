"""A prefix cache as a flat dictionary: the oracle the tree is tested against.

The same rules as the radix tree, written in the most obvious way and at the
cost of looking through everything. Not for serving.
"""

from collections.abc import Iterable, Sequence

from vllm_radix.tree.base import Match, Namespace, PrefixCache, Stats
from vllm_radix.tree.eviction import LRU, EvictionPolicy

_Place = tuple[Namespace, bytes]


class FlatCache(PrefixCache):
    """Maps (namespace, whole prefix) to block ids, the first one being found.

    Args:
        block_size: tokens in a block.
        policy: ranks idle blocks for eviction.
    """

    def __init__(self, block_size: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__(block_size)
        self.policy = policy or LRU()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._blocks: dict[_Place, list[int]] = {}
        self._place: dict[int, _Place] = {}
        self._rank: dict[int, int] = {}
        self._clock = 0
        self.version += 1

    def match(
        self, key: bytes, namespace: Namespace = None, limit: int | None = None
    ) -> Match:
        """Return the longest cached prefix, O(n^2) bytes."""
        found: list[int] = []
        wanted = len(key) // self.block_bytes
        for index in range(wanted if limit is None else min(wanted, limit)):
            prefix = key[: (index + 1) * self.block_bytes]
            if (namespace, prefix) not in self._blocks:
                break
            found.append(self._blocks[namespace, prefix][0])
        return Match(tuple(found))

    def insert(
        self,
        key: bytes,
        blocks: Sequence[int],
        namespace: Namespace = None,
        start: int = 0,
    ) -> list[int]:
        """Cache ``blocks[start:]``."""
        self._checked_insert(key, blocks, start)
        freed = []
        for index in range(start, len(blocks)):
            place = namespace, key[: (index + 1) * self.block_bytes]
            there = self._blocks.setdefault(place, [])
            if there and there[0] in self._rank:
                freed.append(there[0])
                self._forget(there[0])
                there = self._blocks.setdefault(place, [])
            there.append(blocks[index])
            self._place[blocks[index]] = place
            self.version += 1
        return freed

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held."""
        for block in blocks:
            self._rank.pop(block, None)

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle."""
        freed = []
        for block in blocks:
            if block not in self._place or block in self._rank:
                continue
            place = self._place[block]
            if len(self._blocks[place]) > 1:
                self._forget(block)
                freed.append(block)
                continue
            depth = len(place[1]) // self.block_bytes - 1
            self._rank[block] = self.policy.rank(self._clock, depth)
            self._clock += 1
        return freed

    def evict(self, count: int) -> list[int]:
        """Evict the lowest rank among blocks with nothing below, one by one."""
        out: list[int] = []
        while len(out) < count:
            open_to = [block for block in self._rank if not self._has_below(block)]
            if not open_to:
                break
            block = min(open_to, key=self._rank.__getitem__)
            self._forget(block)
            out.append(block)
            self.version += 1
        return out

    def _has_below(self, block: int) -> bool:
        namespace, prefix = self._place[block]
        return any(
            other == namespace and key.startswith(prefix) and len(key) > len(prefix)
            for other, key in self._blocks
        )

    def _forget(self, block: int) -> None:
        place = self._place.pop(block)
        self._rank.pop(block, None)
        self._blocks[place].remove(block)
        if not self._blocks[place]:
            del self._blocks[place]

    def discard(self, block: int) -> bool:
        """Let go of one block."""
        if block not in self._place:
            return False
        self._forget(block)
        self.version += 1
        return True

    def __contains__(self, block: object) -> bool:
        return block in self._place

    def stats(self) -> Stats:
        """Return the sizes; a flat cache has no nodes."""
        return Stats(
            namespaces=len({namespace for namespace, _ in self._blocks}),
            nodes=0,
            cached_blocks=len(self._blocks),
            idle_blocks=len(self._rank),
            spare_blocks=len(self._place) - len(self._blocks),
        )

    def check(self) -> None:
        """Verify that both maps agree and duplicates are held."""
        listed = [block for blocks in self._blocks.values() for block in blocks]
        assert sorted(listed) == sorted(self._place), self._blocks
        for blocks in self._blocks.values():
            assert len(blocks) == 1 or not any(b in self._rank for b in blocks)
