"""Requests at random over a tree and a pool, to see the order of eviction."""

import random

from vllm_radix.tree import RadixTree, encode
from vllm_radix.tree.runs import BYTE, LABEL_AT, runs_of


class Requests:
    """Plays the pool and the requests, as ``engine/`` does.

    Args:
        tree: to drive.
        blocks: of the pool.
        seed: of what is drawn.

    Attributes:
        evicted: blocks in order of eviction.
    """

    def __init__(self, tree: RadixTree, blocks: int, seed: int) -> None:
        self.tree = tree
        self.evicted: list[int] = []
        self._rng = random.Random(seed)
        self._blank = list(range(blocks))
        self._running: list[tuple[list[int], object, int]] = []

    def step(self) -> None:
        """Let a request come or end."""
        if self._running and (self._rng.random() < 0.5 or len(self._running) > 3):
            self._end(self._rng.randrange(len(self._running)))
        else:
            self._admit()

    def end_all(self) -> None:
        """Let all requests end."""
        while self._running:
            self._end(0)

    def _admit(self) -> None:
        rng, size = self._rng, self.tree.block_size
        length = rng.randrange(1, 9)
        symbols = [rng.randrange(1 + 3 * (at > 1)) for at in range(length)]
        key = encode([symbol for symbol in symbols for _ in range(size)])
        found = list(self.tree.match(key).blocks)
        use = self.tree.note_use(key, None, found[-1] if found else -1, len(found))
        self.tree.acquire(found)
        short = length - len(found) - len(self._blank)
        if short > 0:
            self._blank += self._evict(short)
        new = self._blank[: length - len(found)]
        self._blank = self._blank[len(new) :]
        blocks = found + new
        self._blank += self.tree.insert(
            key[: len(blocks) * self.tree.block_bytes], blocks, start=len(found)
        )
        self._running.append((blocks, use, size * length))

    def _evict(self, count: int) -> list[int]:
        """Evict at once, or one by one and see that each is the oldest of its class."""
        if self._rng.random() < 0.5:
            gone = self.tree.evict(count)
        else:
            gone = []
            for _ in range(count):
                oldest = self._oldest()
                gone += self.tree.evict(1)
                assert not gone or gone[-1] in oldest
        self.evicted += gone
        return gone

    def _oldest(self) -> set[int]:
        """Return the block of each class that is the next one to go."""
        evictor = self.tree._evictor
        first: dict[int, tuple[int, int]] = {}
        for entry in evictor.offered():
            node = evictor._table.nodes[entry[1]]
            label = runs_of(node)[-1] >> LABEL_AT & BYTE if self.tree.learns else 0
            first[label] = min(first.get(label, entry), entry)
        return {block for _, block in first.values()}

    def _end(self, index: int) -> None:
        blocks, use, tokens = self._running.pop(index)
        self.tree.note_end(blocks, use, self._rng.choice((1, 100, 999)), tokens)
        held = {block for others, *_ in self._running for block in others}
        idle = [block for block in reversed(blocks) if block not in held]
        self._blank += self.tree.release(idle)


def evicted_by_mixed_operations(
    tree: RadixTree, seed: int, steps: int = 3000
) -> list[int]:
    """Return the blocks that a mix of operations evicts, pins and all, in order."""
    rng = random.Random(seed)
    blank, running, pinned, out = list(range(400)), [], [], []
    for _ in range(steps):
        if running and (rng.random() < 0.5 or len(running) > 12):
            blocks = running.pop(rng.randrange(len(running)))
            idle = [b for b in blocks[::-1] if not any(b in r for r in running)]
            freed = tree.release(idle)
            blank += freed
            blank += [b for b in idle if b not in tree and b not in freed]
            continue
        symbols = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        key = encode([s for s in symbols for _ in range(2)])
        hit = list(tree.match(key).blocks)
        tree.acquire(hit)
        need = len(symbols) - len(hit)
        if need > len(blank):
            got = tree.evict(need - len(blank))
            out += got
            blank += got
        if need > len(blank):
            shared = any(b in r for b in hit for r in running)
            tree.release([] if shared else hit[::-1])
            continue
        new, blank = blank[:need], blank[need:]
        blocks = hit + new
        blank += tree.insert(key, blocks, start=len(hit))
        if len(symbols) > 2 and rng.random() < 0.2:
            tree.pin(blocks[rng.randrange(len(blocks))])
        if rng.random() < 0.2 and pinned:
            tree.unpin(pinned.pop())
        if rng.random() < 0.1:
            pinned.append(blocks[-1])
        running.append(blocks)
    return out
