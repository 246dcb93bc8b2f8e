"""What has changed in a tree, for readers who keep the answers of look-ups."""

from collections.abc import Hashable

from vllm_radix.tree.base import Namespace


class News:
    """What could change a look-up's answer, since the reader cleared it.

    A look-up ends after some block, or at the root of its namespace. Its answer
    grows when an edge that starts there with its next block comes into the tree,
    and shrinks when that last block leaves: both are noted here, so that only the
    look-ups concerned need be repeated.

    Attributes:
        grown: where edges were added: the block before (or ``root``) and the
            first block of tokens.
        gone: blocks that left, or were replaced by another with the same tokens.
        reshaped: something else changed: all look-ups need be repeated.
    """

    __slots__ = ("gone", "grown", "reshaped")

    def __init__(self) -> None:
        self.grown: list[tuple[Hashable, bytes]] = []
        self.gone: list[int] = []
        self.reshaped = False

    def __bool__(self) -> bool:
        return bool(self.grown or self.gone or self.reshaped)

    def clear(self) -> None:
        """Note that all was read."""
        self.grown.clear()
        self.gone.clear()
        self.reshaped = False

    @staticmethod
    def root(namespace: Namespace) -> Hashable:
        """Return what stands for the block before the first of a namespace."""
        return "root", namespace
