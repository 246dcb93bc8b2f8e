"""Runs: what a policy with classes has to know of blocks, kept by edge.

A run is blocks beside each other on one edge that requests have used alike. An edge
lists its runs from the top, each as one whole number, for there are many::

    bits    0-23  depth at which it ends: blocks between the root and what follows it
           24-31  uses, 255 for more
           32-39  class
           40     whether it is released into that class
           41-    1 + the request clock when it was last touched; 0 for never

The list is put right when it is asked for: a leaf may have lost blocks at its end, or
got more. Those that it got are a run that one request has used and that has no class.
"""

from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

from vllm_radix.tree.node import Node

END = (1 << 24) - 1
USE = 1 << 24
USES_AT = 24
LABEL_AT = 32
BYTE = 255
USES = BYTE << USES_AT
RELEASED = 1 << 40
TOUCHED_AT = 41

CHECKPOINT = 64
"""Blocks between two digests that an edge keeps."""

_DIGEST = (1 << 32) - 1


class Returned(NamedTuple):
    """An evicted run that a request asks for again.

    Attributes:
        begin: the depth at which it begins.
        end: the depth at which it ends.
        uses: how often it had been used.
        clock: when it was touched last.
    """

    begin: int
    end: int
    uses: int
    clock: int


def runs_of(node: Node) -> list[int]:
    """Return the runs of an edge, put right: O(1), and O(runs that are gone)."""
    end = node.start + len(node.blocks)
    runs = node.runs
    if runs is None:
        runs = node.runs = [end | USE]
        return runs
    last = runs[-1] & END
    if last == end:
        return runs
    if last < end:
        runs.append(end | USE)
        return runs
    while len(runs) > 1 and runs[-2] & END >= end:
        runs.pop()
    runs[-1] = runs[-1] & ~END | end
    return runs


def runs_to(node: Node, depth: int) -> tuple[list[int], int]:
    """Return the runs of an edge, and how many of them end at a depth or before.

    O(1), and O(runs) where one has to be split at that depth.
    """
    runs = runs_of(node)
    return runs, len(runs) if runs[-1] & END <= depth else split_run(runs, depth)


def split_run(runs: list[int], depth: int) -> int:
    """Let a run end at a depth; return the index of the next one: O(runs)."""
    index = len(runs)
    while index and runs[index - 1] & END > depth:
        index -= 1
    if index < len(runs) and (not index or runs[index - 1] & END < depth):
        runs.insert(index, runs[index] & ~END | depth)
        index += 1
    return index


def cut_runs(node: Node) -> None:
    """Forget what is known of blocks that an edge has lost, before it grows."""
    if node.runs is not None:
        runs_of(node)
    if node.digests is not None:
        del node.digests[len(node.blocks) // CHECKPOINT + 1 :]


def split_runs(upper: Node, node: Node) -> None:
    """Give the runs of an edge, put right before, to its parts, once it is split."""
    if node.runs is not None:
        at = split_run(node.runs, node.start)
        upper.runs, node.runs = node.runs[:at], node.runs[at:]
    upper.digests, node.digests = node.digests, None
    cut_runs(upper)


def merge_runs(node: Node, child: Node) -> None:
    """Give an edge the runs of its only child, before they are joined."""
    if node.runs is not None or child.runs is not None:
        runs_of(node).extend(runs_of(child))


def runs_upwards(
    node: Node | None, depth: int, returned: Sequence[Returned]
) -> Iterator[tuple[int, int, int]]:
    """Yield for each run of a path 1 + its last touch, and the depths of both ends.

    The deepest first; where one was never touched, the first number is 0.

    Args:
        node: the edge where the cached part of the path ends.
        depth: at which it ends.
        returned: what follows it.
    """
    for begin, end, _, clock in reversed(returned):
        yield clock + 1, begin, end
    while node is not None and depth:
        runs = runs_of(node)
        for index in range(len(runs) - 1, -1, -1):
            begin = runs[index - 1] & END if index else node.start
            if begin < depth:
                yield runs[index] >> TOUCHED_AT, begin, depth
                depth = begin
        node = node.parent


def add_uses(node: Node, depth: int, returned: Sequence[Returned]) -> None:
    """Add the uses of evicted runs to what was computed in their place: O(runs)."""
    runs, bottom = runs_of(node), min(depth, node.start + len(node.blocks))
    for begin, end, uses, _ in returned:
        low, high = max(begin, node.start), min(end, bottom)
        if low >= high:
            continue
        first = split_run(runs, low) if low > node.start else 0
        for index in range(first, split_run(runs, high)):
            run = runs[index]
            more = min(BYTE, (run >> USES_AT & BYTE) + uses)
            runs[index] = run & ~(BYTE << USES_AT) | more << USES_AT


def digest_at(
    node: Node, depth: int, size: int, namespace_of: Mapping[Node, Hashable]
) -> int:
    """Return a number that stands for the tokens before a depth of an edge.

    Equal for equal tokens, however the tree is split. O(``CHECKPOINT``) blocks once the
    digests of the edge are known, which costs O(its tokens before the depth).

    Args:
        node: the edge; its first ``depth - node.start`` blocks are there.
        depth: from its start to its end.
        size: bytes of a block's key.
        namespace_of: the namespace of each root.
    """
    unknown = []
    above = node
    while above.digests is None:
        unknown.append(above)
        if above.parent is None:
            above.digests = array("I", (seed_of(namespace_of[above]),))
        else:
            above = above.parent
    for edge in reversed(unknown):
        if edge.digests is None:
            end = above.start + len(above.blocks)
            edge.digests = array("I", (_digest(above, end, size),))
        above = edge
    return _digest(node, depth, size)


def seed_of(namespace: Hashable) -> int:
    """Return the digest of no tokens."""
    return hash(namespace) & _DIGEST


def _digest(node: Node, depth: int, size: int) -> int:
    """Return ``digest_at`` of an edge that knows the digest of its start."""
    digests = node.digests
    assert digests is not None
    inside = depth - node.start
    index, step = inside // CHECKPOINT, CHECKPOINT * size
    while len(digests) <= index:
        at = (len(digests) - 1) * step
        digests.append(crc32(node.key[at : at + step], digests[-1]))
    return crc32(node.key[index * step : inside * size], digests[index])
