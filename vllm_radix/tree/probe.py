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
