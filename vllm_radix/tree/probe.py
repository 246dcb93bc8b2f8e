"""Look-ups that are repeated: how much of a key is cached, from where it ended last."""

from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.shape import Shape


class Probe:
    """The answer to ``RadixTree.probe``, and where to resume from.

    Attributes:
        num_blocks: length of the cached prefix in blocks.
        node: the edge that it ends on.
        epoch: of the tree, when the probe was made.
    """

    __slots__ = ("epoch", "node", "num_blocks")

    def __init__(self, node: Node, num_blocks: int, epoch: int) -> None:
        self.node = node
        self.num_blocks = num_blocks
        self.epoch = epoch

    @property
    def anchor(self) -> tuple[int | None, int]:
        """The block behind which a change may alter the answer, and its depth."""
        return self.last_block, self.num_blocks

    @property
    def last_block(self) -> int | None:
        """The block that the prefix ends with, asked before the tree changes again.

        None when nothing is cached.
        """
        if not self.num_blocks:
            return None
        return self.node.blocks[self.num_blocks - 1 - self.node.start]


def probe(
    shape: Shape, key: bytes, namespace: Namespace, wanted: int, last: Probe | None
) -> Probe | None:
    """See ``RadixTree.probe``.

    Args:
        shape: the tree.
        key: as for ``match``.
        namespace: as for ``match``.
        wanted: most blocks to match.
        last: the previous answer, if any.
    """
    root = shape.roots.get(namespace)
    if root is None:
        return None
    node, depth = root, 0
    if last is not None and last.epoch == shape.epoch and last.node.alive:
        node = last.node
        # A split may have moved the end of the match to a node above.
        while node.parent is not None and node.start >= last.num_blocks:
            shape.visited += 1
            node = node.parent
        depth = last.num_blocks
        if depth > node.start + len(node.blocks):
            node, depth = root, 0  # trimmed since
    while True:
        inside = depth - node.start
        if inside < len(node.blocks):
            # Go on along this edge, as far as it is cached.
            shape.visited += 1
            length = inside + shape.shared_blocks(node, inside, key, depth, wanted)
            run = node.blocks[inside:length] if node.holes else ()
            if HOLE in run:
                return Probe(node, depth + run.index(HOLE), shape.epoch)
            depth = node.start + length
            if length < len(node.blocks):
                break
        if depth >= wanted:
            break
        below = shape.child(node, key, depth)
        if below is None or below.blocks[0] == HOLE:
            break
        node = below
    return Probe(node, depth, shape.epoch)
