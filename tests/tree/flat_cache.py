"""A prefix cache as a flat dictionary: the oracle the tree is tested against.

The same rules as the radix tree, written in the most obvious way and at the
cost of looking through everything. Not for serving.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from vllm_radix.tree import (
    BYTES_PER_TOKEN,
    Match,
    Namespace,
    PartialMatch,
    PrefixCache,
    Stats,
    common_units,
)
from vllm_radix.tree.evictor import DONE, KEEP, LEVEL, PIN, UNHIT
from vllm_radix.tree.prefix_cache import ALL_WRITTEN

_Place = tuple[Namespace, bytes]


class FlatCache(PrefixCache):
    """Maps (namespace, whole prefix) to block ids, the first one being found.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._blocks: dict[_Place, list[int]] = {}
        self._place: dict[int, _Place] = {}
        self._rank: dict[int, int] = {}
        self._hit: set[int] = set()
        self._pins: dict[int, int] = {}
        self._kept: dict[int, int] = {}
        self._clock = 0
        self.version += 1

    def match(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        *,
        partial: bool = False,
        written: Mapping[int, int] = ALL_WRITTEN,
    ) -> Match:
        """Return the longest cached prefix, O(n^2) bytes."""
        found: list[int] = []
        tokens = len(key) // BYTES_PER_TOKEN
        if limit is not None:
            tokens = min(tokens, limit)
        for index in range(tokens // self.block_size):
            prefix = key[: (index + 1) * self.block_bytes]
            if (namespace, prefix) not in self._blocks:
                break
            found.append(self._blocks[namespace, prefix][0])
        end = len(found) * self.block_bytes
        rest = key[end : min(end + self.block_bytes, tokens * BYTES_PER_TOKEN)]
        if not partial or not rest:
            return Match(tuple(found))
        here = self._beside(namespace, key[:end])
        blocks = {
            tail: self._blocks[namespace, key[:end] + tail][0]
            for tail in here
            if (namespace, key[:end] + tail) in self._blocks
        }
        tails = sorted(blocks)
        at = bisect_left(tails, rest)
        best: PartialMatch | None = None
        for order in (tails[at:], tails[:at][::-1]):
            for tail in order:
                shared = common_units(rest, 0, tail, 0, BYTES_PER_TOKEN)
                shared = min(shared, written.get(blocks[tail], shared))
                if shared > (best.num_tokens if best else 0):
                    best = PartialMatch(
                        blocks[tail], shared, len(tail) // BYTES_PER_TOKEN
                    )
                if blocks[tail] not in written:
                    break
        return Match(tuple(found), best)

    def _beside(self, namespace: Namespace, before: bytes) -> list[bytes]:
        """Return what is known to follow ``before``, one block each, sorted."""
        tails = {
            key[len(before) : len(before) + self.block_bytes]
            for other, key in self._blocks
            if other == namespace and key.startswith(before) and len(key) > len(before)
        }
        return sorted(tails)

    def insert(
        self,
        key: bytes,
        blocks: Sequence[int],
        namespace: Namespace = None,
        start: int = 0,
    ) -> list[int]:
        """Cache ``blocks[start:]``."""
        self._refuse_key(key, len(blocks))
        known = self._partial_at(blocks[start], start) if blocks[start:] else None
        if known is not None:
            self._refuse_other(known, key, blocks[start])
        for index in range(start + (known is not None), len(blocks)):
            self._refuse(blocks[index])
        if known is not None:
            self._forget(blocks[start])
        freed: list[int] = []
        for index in range(start, len(blocks)):
            place = namespace, key[: (index + 1) * self.block_bytes]
            before = key[: index * self.block_bytes]
            if place[1][len(before) :] not in self._beside(namespace, before):
                self._outdate(namespace, before, place[1], freed)
            there = self._blocks.setdefault(place, [])
            if there and there[0] in self._rank:
                freed.append(there[0])
                if there[0] in self._kept:
                    self._kept[blocks[index]] = self._kept[there[0]]
                self._forget(there[0])
                there = self._blocks.setdefault(place, [])
            there.append(blocks[index])
            self._place[blocks[index]] = place
            self.version += 1
        return freed

    def insert_partial(
        self, key: bytes, blocks: Sequence[int], namespace: Namespace = None
    ) -> tuple[bool, list[int]]:
        """Cache a partial block."""
        self._refuse_partial(key, len(blocks))
        block, depth = blocks[-1], len(blocks) - 1
        known = self._partial_at(block, depth)
        was_hit = False
        if known is None:
            self._refuse(block)
        else:
            self._refuse_other(known, key, block)
            if known == key:
                return True, []
            was_hit = block in self._hit
            self._forget(block)
            self.version += 1
        before = key[: depth * self.block_bytes]
        if depth and (namespace, before) not in self._blocks:
            return False, []
        for other, cached in self._blocks:
            inside = len(cached) <= len(before) + self.block_bytes
            if other == namespace and inside and cached.startswith(key):
                return False, []
        freed: list[int] = []
        self._outdate(namespace, before, key, freed)
        self._blocks[namespace, key] = [block]
        self._place[block] = namespace, key
        if was_hit:
            self._hit.add(block)
        self.version += 1
        return True, freed

    def note_hit(self, block: int) -> None:
        """Note that a request copies from a block."""
        if block in self._place:
            self._hit.add(block)

    def _partial_at(self, block: int, depth: int) -> bytes | None:
        key = self._place[block][1] if block in self._place else b""
        whole, part = divmod(len(key), self.block_bytes)
        return key if part and whole == depth else None

    def _outdate(
        self, namespace: Namespace, before: bytes, key: bytes, freed: list[int]
    ) -> None:
        """Drop the idle partial block next to ``key`` if it says no more."""
        tail = key[len(before) :]
        lower = [other for other in self._beside(namespace, before) if other < tail]
        if not lower or len(lower[-1]) == self.block_bytes:
            return
        (block,) = self._blocks[namespace, before + lower[-1]]
        if tail.startswith(lower[-1]) and block in self._rank:
            self._forget(block)
            freed.append(block)

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
            self._rank[block] = self._clock
            if len(place[1]) % self.block_bytes and block not in self._hit:
                self._rank[block] += UNHIT
            self._rank[block] += self._kept.get(block, 0)
            if block in self._pins:
                self._rank[block] += PIN
            self._clock += 1
        return freed

    def pin(self, block: int) -> None:
        """Evict a block last."""
        place = self._place.get(block)
        if place is None or len(place[1]) % self.block_bytes:
            return
        if self._blocks[place][0] != block:
            return
        self._pins[block] = self._pins.get(block, 0) + 1
        self._place_again(block)

    def unpin(self, block: int) -> None:
        """Take back one pin."""
        if block in self._pins:
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._place_again(block)

    def _place_again(self, block: int) -> None:
        """Give an idle block the rank that its pins and its being kept ask for."""
        if block in self._rank:
            pinned = PIN * (block in self._pins)
            rank = self._rank[block] % LEVEL
            self._rank[block] = rank + self._kept.get(block, 0) + pinned

    def keep(self, block: int, level: int = 0) -> bool:
        """Evict a block after others."""
        place = self._place.get(block)
        if place is None or len(place[1]) % self.block_bytes:
            return False
        if self._blocks[place][0] != block:
            return False
        self._kept[block] = KEEP + level * LEVEL
        self._place_again(block)
        return True

    def unkeep(self, block: int) -> None:
        """Evict a block in the order of all."""
        if self._kept.pop(block, None) is not None:
            self._place_again(block)

    @property
    def num_kept(self) -> int:
        """How many blocks are kept."""
        return len(self._kept)

    def let_these_go(self, blocks: Sequence[int], level: int) -> None:
        """Evict idle, unpinned blocks before others."""
        for block in blocks:
            assert self._rank[block] < PIN
            self._kept.pop(block, None)
            if self._rank[block] >= DONE:
                clock = self._rank[block] % LEVEL
                self._rank[block] = clock + DONE + level * LEVEL

    @property
    def num_pinned_idle(self) -> int:
        """How many idle blocks are before a pinned one, O(n^2)."""
        ends = [self._place[block] for block in self._pins]
        return sum(
            any(
                space == self._place[block][0] and key.startswith(self._place[block][1])
                for space, key in ends
            )
            for block in self._rank
            if not len(self._place[block][1]) % self.block_bytes
        )

    def evict(self, count: int) -> list[int]:
        """Evict the least recently used of those with nothing below, one by one."""
        out: list[int] = []
        while len(out) < count:
            ranks = self.evictable_ranks()
            if not ranks:
                break
            block = min(ranks, key=ranks.__getitem__)
            self._forget(block)
            out.append(block)
            self.version += 1
        return out

    def evict_these(self, blocks: Sequence[int]) -> None:
        """Evict blocks one by one, as another cache did by its own order.

        Raises:
            AssertionError: one is not next by any order: something lies below it, or a
                partial block that was never hit is left, or an unpinned one.
        """
        for block in blocks:
            ranks = self.evictable_ranks()
            assert block in ranks, f"{block} may not go"
            assert self._turn(ranks[block]) == min(map(self._turn, ranks.values()))
            self._forget(block)
            self.version += 1

    @staticmethod
    def _turn(rank: int) -> tuple[int, int]:
        """Return what a policy has no say in: ranks of first and last blocks."""
        if rank < 0:
            return 0, rank
        return (2, rank) if rank >= KEEP else (1, 0)

    def evictable_ranks(self) -> dict[int, int]:
        """Return the ranks of the blocks that may be evicted now, by block."""
        return {b: rank for b, rank in self._rank.items() if not self._has_below(b)}

    def _has_below(self, block: int) -> bool:
        namespace, prefix = self._place[block]
        if len(prefix) % self.block_bytes:
            return False
        return any(
            other == namespace and key.startswith(prefix) and len(key) > len(prefix)
            for other, key in self._blocks
        )

    def _forget(self, block: int) -> None:
        place = self._place.pop(block)
        self._rank.pop(block, None)
        self._hit.discard(block)
        self._pins.pop(block, None)
        kept = self._kept.pop(block, None)
        self._blocks[place].remove(block)
        if not self._blocks[place]:
            del self._blocks[place]
        elif kept is not None:
            self._kept[self._blocks[place][0]] = kept

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
            duplicate_blocks=len(self._place) - len(self._blocks),
            unhit_blocks=sum(rank < DONE for rank in self._rank.values()),
            partial_blocks=sum(len(k) % self.block_bytes > 0 for _, k in self._blocks),
        )

    def check(self) -> None:
        """Verify that both maps agree and duplicates are held."""
        listed = [block for blocks in self._blocks.values() for block in blocks]
        assert sorted(listed) == sorted(self._place), self._blocks
        for blocks in self._blocks.values():
            assert len(blocks) == 1 or not any(b in self._rank for b in blocks)
