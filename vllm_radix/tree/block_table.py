"""The table from block id to the place of the block in the tree."""

from array import array
from collections.abc import Sequence

from vllm_radix.tree.node import HOLE, Node

HELD = -1
"""In place of a rank: the block is held, or not cached."""


class BlockTable:
    """Maps block ids to places in the tree, and to their duplicates.

    Arrays by block id, as an object per block would be work for the garbage collector.

    Attributes:
        nodes: the node that each block is in; None where it is not cached.
        depths: blocks before it. Counted from the root, so that a split, which moves
            blocks between nodes, leaves it alone.
        ranks: its rank for eviction while it is idle, else ``HELD``.
        duplicates: blocks that hold the same tokens in the same place as a cached
            one, by that one.
        duplicate_of: the cached block that each duplicate stands by.
        num_cached: blocks in the tree, duplicates aside.
    """

    def __init__(self) -> None:
        self.nodes: list[Node | None] = []
        self.depths = array("i")
        self.ranks = array("q")
        self.duplicates: dict[int, list[int]] = {}
        self.duplicate_of: dict[int, int] = {}
        self.num_cached = 0

    def __contains__(self, block: object) -> bool:
        if not isinstance(block, int) or block < 0:
            return False
        if block in self.duplicate_of:
            return True
        return block < len(self.nodes) and self.nodes[block] is not None

    def grow(self, size: int) -> None:
        """Make room for block ids below ``size``."""
        missing = size - len(self.nodes)
        if missing > 0:
            self.nodes += [None] * missing
            self.depths.frombytes(bytes(missing * self.depths.itemsize))
            self.ranks.extend(array("q", [HELD]) * missing)

    def node_of(self, block: int) -> Node | None:
        """Return the node that a block is in, if any."""
        return self.nodes[block] if 0 <= block < len(self.nodes) else None

    def node_before(self, blocks: Sequence[int], start: int) -> Node | None:
        """Return the node of block ``start - 1``, if it is where it should be."""
        if start == 0 or not 0 <= blocks[start - 1] < len(self.nodes):
            return None
        node = self.nodes[blocks[start - 1]]
        # Not if the id has since been given to another place of another path.
        if node is None or self.depths[blocks[start - 1]] != start - 1:
            return None
        # Nor if the block was never published as the full one it is by now.
        return None if node.partial else node

    def partial_node(self, block: int, depth: int) -> Node | None:
        """Return the node of a block that is cached as a partial one there."""
        node = self.node_of(block)
        if node is None or not node.partial or node.start != depth:
            return None
        return node

    def assign_owner(self, block: int, node: Node, depth: int) -> None:
        """Put a block, held, into a node."""
        self.nodes[block] = node
        self.depths[block] = depth
        self.ranks[block] = HELD
        self.num_cached += 1

    def assign_owners(self, blocks: list[int], node: Node, depth: int) -> None:
        """Put a run of blocks, held, into a node; the first one at ``depth``."""
        nodes, depths, ranks = self.nodes, self.depths, self.ranks
        for block in blocks:
            nodes[block] = node
            depths[block] = depth
            ranks[block] = HELD
            depth += 1
        self.num_cached += len(blocks)

    def move(self, blocks: list[int], node: Node) -> None:
        """Note that blocks are in another node now, as deep as before."""
        nodes = self.nodes
        for block in blocks:
            if block != HOLE:
                nodes[block] = node

    def clear_owner(self, block: int) -> None:
        """Take a held block out of its node."""
        self.nodes[block] = None
        self.num_cached -= 1

    def add_duplicate(self, block: int, of: int) -> None:
        """Let a block stand by a cached one."""
        self.duplicates.setdefault(of, []).append(block)
        self.duplicate_of[block] = of

    def drop_duplicate(self, block: int) -> None:
        """Let a duplicate stand by no more."""
        of = self.duplicate_of.pop(block)
        others = self.duplicates[of]
        others.remove(block)
        if not others:
            del self.duplicates[of]

    def next_duplicate(self, of: int) -> int:
        """Take the first duplicate of a block; the others stand by it instead."""
        block, *others = self.duplicates.pop(of)
        del self.duplicate_of[block]
        if others:
            self.duplicates[block] = others
            for other in others:
                self.duplicate_of[other] = block
        return block
