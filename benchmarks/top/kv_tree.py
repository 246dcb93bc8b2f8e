"""The tree of cached blocks, as events tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_radix_bench.top.kv_events import (
    AllBlocksCleared,
    Batch,
    BlockHash,
    BlockRemoved,
    BlockStored,
)

Place = tuple[int, int, str]
"""Rank of the engine, cache group and medium: each has a tree of its own."""


_BEGIN = 64
"""Token ids of a row that are kept, to show its text."""


@dataclass(frozen=True)
class Block:
    """A cached block.

    Attributes:
        parent: hash of the block before it; None at the beginning of a prompt.
        tokens: its token ids.
    """

    parent: BlockHash | None
    tokens: Sequence[int]


@dataclass
class Subtree:
    """Blocks in a row without a branch, and all that is below them.

    Attributes:
        place: where they are.
        blocks: of the subtree.
        tokens: of the subtree.
        depth: blocks from the beginning of the prompt to the end of the row.
        level: branches above.
        is_cut: whether the block before the row is not known, or not cached any more.
        begin: the row's first token ids.
        children: rows that follow.
    """

    place: Place
    depth: int
    level: int
    is_cut: bool = False
    blocks: int = 0
    tokens: int = 0
    begin: list[int] = field(default_factory=list)
    children: "list[Subtree]" = field(default_factory=list)


class KVTree:
    """The trees of a server's engines, cache groups and media."""

    def __init__(self) -> None:
        self.places: dict[Place, dict[BlockHash, Block]] = {}
        self._next: dict[int, int] = {}
        self._latest: dict[int, float] = {}
        self._lost: dict[int, int] = {}

    def apply(self, number: int, batch: Batch) -> None:
        """Apply a batch; one that has been applied is left out.

        Numbers count up from 0. One that is too high shows that batches were lost, and
        one that is too low, but later, that the engine was started anew.
        """
        rank = batch.data_parallel_rank or 0
        expected = self._next.get(rank, 0)
        if number < expected:
            if batch.ts <= self._latest[rank]:
                return
            self._clear(rank)
            expected = 0
        if number > expected:
            self._lost[rank] = self._lost.get(rank, 0) + number - expected
        self._latest[rank] = batch.ts
        self._next[rank] = number + 1
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._clear(rank)
            elif isinstance(event, BlockStored):
                self._store(rank, event)
            else:
                self._remove(rank, event)

    @property
    def lost_batches(self) -> int:
        """Batches that did not come since the last time when nothing was cached."""
        return sum(self._lost.values())

    @property
    def has_events(self) -> bool:
        """Whether anything came."""
        return bool(self._next)

    def _clear(self, rank: int) -> None:
        """Forget a rank's blocks; what was lost before does not matter any more."""
        self.places = {p: blocks for p, blocks in self.places.items() if p[0] != rank}
        self._lost.pop(rank, None)

    def _at(
        self, rank: int, event: BlockStored | BlockRemoved
    ) -> dict[BlockHash, Block]:
        place = (rank, event.group_idx or 0, event.medium or "GPU")
        return self.places.setdefault(place, {})

    def _store(self, rank: int, event: BlockStored) -> None:
        blocks, parent = self._at(rank, event), event.parent_block_hash
        for at, name in enumerate(event.block_hashes):
            begin = at * event.block_size
            tokens = event.token_ids[begin : begin + event.block_size]
            blocks[name] = Block(parent, tokens)
            parent = name

    def _remove(self, rank: int, event: BlockRemoved) -> None:
        blocks = self._at(rank, event)
        for name in event.block_hashes:
            blocks.pop(name, None)

    @property
    def num_blocks(self) -> int:
        """Blocks that are cached."""
        return sum(len(blocks) for blocks in self.places.values())

    def subtrees(self) -> list[Subtree]:
        """Return the trees, each as its first row; in time linear in the blocks."""
        out = []
        for place, blocks in self.places.items():
            children: dict[BlockHash | None, list[BlockHash]] = {}
            for name, block in blocks.items():
                children.setdefault(block.parent, []).append(name)
            out += [
                _subtree(place, blocks, children, name)
                for parent, names in children.items()
                if parent not in blocks
                for name in names
            ]
        return out


def _subtree(
    place: Place,
    blocks: Mapping[BlockHash, Block],
    children: Mapping[BlockHash | None, Sequence[BlockHash]],
    first: BlockHash,
) -> Subtree:
    """Return the subtree that begins with a block."""
    root = Subtree(place, 0, 0, is_cut=blocks[first].parent is not None)
    made, todo = [root], [(first, root)]
    # Parents come before their children in `made`, however deep the tree is.
    while todo:
        name, row = todo.pop()
        while True:
            tokens = blocks[name].tokens
            row.blocks += 1
            row.depth += 1
            row.tokens += len(tokens)
            row.begin += tokens[: _BEGIN - len(row.begin)]
            below = children.get(name, ())
            if len(below) != 1:
                break
            name = below[0]
        for child in below:
            next_row = Subtree(place, row.depth, row.level + 1)
            row.children.append(next_row)
            made.append(next_row)
            todo.append((child, next_row))
    for one in reversed(made):
        one.blocks += sum(child.blocks for child in one.children)
        one.tokens += sum(child.tokens for child in one.children)
    return root


def largest(roots: Sequence[Subtree], most: int) -> list[Subtree]:
    """Return the largest subtrees, each below the one that it is in.

    Args:
        roots: of the trees.
        most: subtrees to return.
    """
    found: list[Subtree] = []
    todo = list(roots)
    # A part is never larger than the whole: what is shown has its parent shown.
    while todo and len(found) < most:
        best = max(todo, key=lambda one: one.blocks)
        todo.remove(best)
        found.append(best)
        todo += best.children
    shown = {id(one) for one in found}
    out: list[Subtree] = []
    stack = sorted((r for r in roots if id(r) in shown), key=lambda one: one.blocks)
    while stack:
        one = stack.pop()
        out.append(one)
        inside = (child for child in one.children if id(child) in shown)
        stack += sorted(inside, key=lambda child: child.blocks)
    return out
