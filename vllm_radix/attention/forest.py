"""Which requests of a batch hold the same leading blocks: a forest, from block tables.

Numpy only. In a cache that keeps every token's block, equal block ids at equal places
from the first block on are equal keys and values; where blocks are given up while their
request runs (sliding windows) they are not, and such layouts are refused. Only blocks
that are full and lie before a request's first query row count, so what a
request writes is never shared.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass
class Node:
    """A run of blocks that several requests hold.

    Attributes:
        low: first of its requests, in the forest's order.
        high: end of them.
        start: blocks before the run.
        end: blocks up to its end.
        parent: position of its parent among the nodes, -1 for a root.
    """

    low: int
    high: int
    start: int
    end: int
    parent: int = -1


@dataclass
class Forest:
    """Shared runs of blocks of a batch.

    Attributes:
        order: [R] requests, such that each node holds a range of them.
        nodes: parents before children.
        depth: [R] blocks that each request, in that order, shares with any other.
    """

    order: npt.NDArray[np.intp]
    nodes: list[Node]
    depth: npt.NDArray[np.int64]


def grow_forest(tables: Ints, full: npt.NDArray[np.int64]) -> Forest | None:
    """Return the forest of a batch, or None where nothing is shared.

    Requests are sorted by their blocks, and nodes read off what neighbours have in
    common (as the tree of a suffix array; Kasai et al., 2001, for the interval stack).
    O(R log R) comparisons of rows, O(R x W) for the common parts; a batch whose first
    blocks all differ costs O(R log R).

    Args:
        tables: [R, W] block ids of each request, at least 0.
        full: [R] leading blocks of each that count.
    """
    num_requests = len(full)
    width = int(full.max()) if num_requests else 0
    if width == 0:
        return None
    width = _common_width(tables, full, width)
    if width == 0:
        return None
    inside = np.arange(width) < full[:, None]
    blocks = np.where(inside, tables[:, :width], 0)
    # Big-endian, so that the order of bytes is the order of blocks.
    keys = blocks.astype(">u4").view(f"V{4 * width}").ravel()
    order = np.argsort(keys, kind="stable")
    blocks, lengths = blocks[order], full[order]
    differ = blocks[1:] != blocks[:-1]
    first = np.where(differ.any(1), np.argmax(differ, axis=1), width)
    common = np.minimum(first, np.minimum(lengths[1:], lengths[:-1]))
    if not common.any():
        return None
    beside = np.zeros(num_requests + 1, dtype=np.int64)
    beside[1:-1] = common
    depth = np.maximum(beside[1:], beside[:-1])
    return Forest(order, _nodes(common.tolist()), depth)


def _common_width(tables: Ints, full: npt.NDArray[np.int64], width: int) -> int:
    """Return a number of blocks that no two requests have more of in common.

    Requests that share more than ``c`` blocks have the same one in column ``c``, so a
    column without doubles is a bound. Found by doubling, then by halving what is left;
    O(R log R) for each column looked at.
    """

    def doubles(column: int) -> bool:
        blocks = tables[full > column, column]
        return len(np.unique(blocks)) < len(blocks)

    low, high = 0, 1
    while low < width and doubles(low):
        low, high = high, 2 * high
    if low >= width:
        return width
    # No doubles in column `low`; doubles in the one looked at before.
    floor, bound = low // 2, low
    for _ in range(4):
        middle = (floor + bound) // 2
        if middle == floor:
            break
        floor, bound = (middle, bound) if doubles(middle) else (floor, middle)
    return bound


def _nodes(common: list[int]) -> list[Node]:
    """Return the nodes for what neighbours have in common."""
    found: list[Node] = []
    open_nodes: list[tuple[int, int]] = []
    for place, length in enumerate([*common, 0]):
        low = place
        while open_nodes and open_nodes[-1][0] > length:
            end, low = open_nodes.pop()
            below = open_nodes[-1][0] if open_nodes else 0
            found.append(Node(low, place + 1, max(length, below), end))
        if length > (open_nodes[-1][0] if open_nodes else 0):
            open_nodes.append((length, low))
    found.reverse()
    path: list[int] = []
    for number, node in enumerate(found):
        while path and not _holds(found[path[-1]], node):
            path.pop()
        node.parent = path[-1] if path else -1
        path.append(number)
    return found


def _holds(outer: Node, inner: Node) -> bool:
    return outer.low <= inner.low and inner.high <= outer.high
