"""The answer to a look-up that is asked again and again."""

from vllm_radix.tree.node import Node


class Probe:
    """The answer to ``RadixTree.probe``, and where to resume from.

    Attributes:
        num_blocks: length of the cached prefix in blocks.
    """

    __slots__ = ("_epoch", "_node", "num_blocks")

    def __init__(self, node: Node, num_blocks: int, epoch: int) -> None:
        self._node = node
        self.num_blocks = num_blocks
        self._epoch = epoch

    @property
    def last_block(self) -> int | None:
        """The block that the prefix ends with, asked before the tree changes again.

        None when nothing is cached.
        """
        if not self.num_blocks:
            return None
        return self._node.blocks[self.num_blocks - 1 - self._node.start]
