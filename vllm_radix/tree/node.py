"""A node of the radix tree."""

from array import array

HOLE = -1
"""In ``Node.blocks``: the path is known, the block is gone."""


class Node:
    """One edge of the tree: a run of whole blocks, or a single partial block.

    Attributes:
        parent: the node above; None for a root and for a removed node.
        key: the edge's tokens; a ``bytearray`` once the edge has grown, so that
            growing costs what is added. It may be longer than ``blocks``: the tokens
            of blocks that eviction trims from the tail are cut off later, in one go.
            The key of a partial block is shorter than a block.
        blocks: block ids, ``HOLE`` where one was discarded.
        start: blocks between the root and this edge.
        children: nodes below, sorted by ``child_keys``.
        child_keys: the first block of each child's key.
        partial: the edge is a single partial block, and the node a leaf.
        holes: how many of ``blocks`` are holes.
        alive: whether the node is in the tree.
        hit: a request has copied from this partial block.
        trimmed: eviction has shortened this leaf since it last grew.
        pinned_to: blocks between the root and the last block of this edge that is
            pinned or lies before a pinned one; ``start`` where there is none.
        pinned_children: children with such blocks.
        shared_to: blocks between the root and the last block of this edge that more
            than one path has used; ``start`` where there is none.
        runs: how its blocks were used, for policies that ask; see ``runs``.
        digests: of the tokens before its start and before every 64th block; None until
            they are asked for.
    """

    __slots__ = (
        "alive",
        "blocks",
        "child_keys",
        "children",
        "digests",
        "hit",
        "holes",
        "key",
        "parent",
        "partial",
        "pinned_children",
        "pinned_to",
        "runs",
        "shared_to",
        "start",
        "trimmed",
    )

    def __init__(
        self,
        parent: "Node | None",
        key: bytes | bytearray,
        blocks: list[int],
        start: int,
        partial: bool = False,
    ) -> None:
        self.parent = parent
        self.key: bytes | bytearray = key
        self.blocks = blocks
        self.start = start
        self.children: list[Node] = []
        self.child_keys: list[bytes] = []
        self.partial = partial
        self.hit = False
        self.holes = 0
        self.alive = True
        self.trimmed = False
        self.pinned_to = start
        self.pinned_children = 0
        self.shared_to = start
        self.runs: list[int] | None = None
        self.digests: array[int] | None = None
