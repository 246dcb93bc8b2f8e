"""A log of tree changes, so that a reader can repeat only the look-ups they affect."""

from collections.abc import Hashable

from vllm_radix.tree.prefix_cache import Namespace


class ChangeLog:
    """The changes that may alter a look-up's answer, since the reader cleared it.

    A look-up ends after some block, or at the root of its namespace. Its answer
    grows when an edge that starts there with its next block comes into the tree,
    and shrinks when that last block leaves: both are noted here, so that only those
    look-ups need be repeated.

    Attributes:
        added_edges: where edges were added: the block before (or ``root``) and the
            first block of tokens.
        removed_blocks: blocks that left, or were replaced by another with the same
            tokens.
        rescan_all: something else changed: all look-ups need be repeated.
    """

    __slots__ = ("added_edges", "removed_blocks", "rescan_all")

    def __init__(self) -> None:
        self.added_edges: list[tuple[Hashable, bytes]] = []
        self.removed_blocks: list[int] = []
        self.rescan_all = False

    def __bool__(self) -> bool:
        return bool(self.added_edges or self.removed_blocks or self.rescan_all)

    def clear(self) -> None:
        """Empty the log: its reader has read all of it."""
        self.added_edges.clear()
        self.removed_blocks.clear()
        self.rescan_all = False

    @staticmethod
    def root(namespace: Namespace) -> Hashable:
        """Return what stands for the block before the first of a namespace."""
        return "root", namespace
