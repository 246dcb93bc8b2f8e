"""A node of the radix tree."""

HOLE = -1
"""In ``Node.blocks``: the path is known, the block is gone."""


class Node:
    """One edge of the tree: a run of whole blocks, or a single partial block.

    Attributes:
        parent: the node above; None for a root and for a removed node.
        key: the edge's tokens; a ``bytearray`` once the edge has grown, so that
            growing costs what is added. May be longer than ``blocks``: what eviction
            trims from the tail is cut off later, in one go. Of a partial block,
            whose node is always a leaf, less than one block of tokens.
        blocks: block ids, ``HOLE`` where one was discarded.
        start: blocks between the root and this edge.
        children: nodes below, sorted by ``first``.
        first: the first block of each child's key.
        holes: how many of ``blocks`` are holes.
        alive: False once the node has left the tree.
        hit: of a partial block: somebody has copied from it.
        trimmed: eviction has shortened this leaf since it last grew.
        pinned_to: blocks between the root and the last block of this edge that is
            pinned or lies before a pinned one; ``start`` where there is none.
        pinned_children: children with such blocks.
    """

    __slots__ = (
        "alive",
        "blocks",
        "children",
        "first",
        "hit",
        "holes",
        "key",
        "parent",
        "pinned_children",
        "pinned_to",
        "start",
        "trimmed",
    )

    def __init__(
        self,
        parent: "Node | None",
        key: bytes | bytearray,
        blocks: list[int],
        start: int,
    ) -> None:
        self.parent = parent
        self.key: bytes | bytearray = key
        self.blocks = blocks
        self.start = start
        self.children: list[Node] = []
        self.first: list[bytes] = []
        self.hit = False
        self.holes = 0
        self.alive = True
        self.trimmed = False
        self.pinned_to = start
        self.pinned_children = 0
