"""What somebody may say of blocks: these are of no use any more, those are to stay.

Nothing here holds a block. It changes which idle ones go first.
"""

from collections.abc import Callable

from vllm_radix.tree.block_table import HELD
from vllm_radix.tree.node import HOLE
from vllm_radix.tree.tree_state import TreeState


class HintedTree(TreeState):
    """The operations of ``RadixTree`` that hints need; not public."""

    @property
    def on_unkept(self) -> Callable[[int], None] | None:
        """Called with each block that is no longer kept, whatever the reason."""
        return self._evictor.on_unkept

    @on_unkept.setter
    def on_unkept(self, call: Callable[[int], None] | None) -> None:
        self._evictor.on_unkept = call

    @property
    def on_kept_moved(self) -> Callable[[int, int], None] | None:
        """Called with a kept block that leaves, and the one that is kept instead."""
        return self._evictor.on_kept_moved

    @on_kept_moved.setter
    def on_kept_moved(self, call: Callable[[int, int], None] | None) -> None:
        self._evictor.on_kept_moved = call

    def keep(self, block: int, level: int = 0) -> bool:
        """Evict a block, and so those before it on its path, after others: O(log n).

        After all that is neither kept nor pinned, and the higher the level, the later;
        before what is pinned. It ends with ``unkeep``, or when the block goes; one that
        takes its place is kept in its stead.

        Args:
            block: a whole block that is cached, idle or held.
            level: from 0 to 15; replaces the one of before.

        Returns:
            Whether it is kept: not if it is not cached, a duplicate, or partial.
        """
        node = self._table.node_of(block)
        if node is None or node.partial:
            return False
        self._evictor.keep(block, level)
        return True

    def unkeep(self, block: int) -> None:
        """Evict a block in the order of all again, if it was kept: O(log n)."""
        self._evictor.unkeep(block)

    def path_end(self, length: int, block_at: Callable[[int], int]) -> tuple[int, int]:
        """Return the last whole block that is cached of a path, and how many there are.

        O(those at the end that are not); nothing to say is (-1, 0).

        Args:
            length: blocks of the path.
            block_at: returns one of them.
        """
        table = self._table
        for depth in range(length, 0, -1):
            there = self.resident(block_at(depth - 1))
            node = table.node_of(there)
            at_depth = node is not None and table.depths[there] == depth - 1
            if node is not None and at_depth and not node.partial:
                return there, depth
        return -1, 0

    def holds(self, block: int, depth: int, tokens: bytes) -> bool:
        """Return whether a whole block is cached at a depth with these tokens: O(1)."""
        node = self._table.node_of(block)
        if node is None or node.partial or self._table.depths[block] != depth:
            return False
        at = (depth - node.start) * self.block_bytes
        return node.key[at : at + self.block_bytes] == tokens

    @property
    def num_kept(self) -> int:
        """Number of blocks that ``keep`` was called for."""
        return len(self._evictor.kept)

    def resident(self, block: int) -> int:
        """Return the block in whose place another one would be found: O(1)."""
        return self._table.duplicate_of.get(block, block)

    def note_parting(
        self, block: int, shared: bool = False, follower: int = HOLE
    ) -> None:
        """Note that a request was admitted whose cached prefix ends with a block: O(1).

        If the path goes on there, the request parts from it: what both have used is no
        longer the affair of one of them; see ``let_go``. A request that goes on from
        the end of a path counts as the same session.

        Args:
            block: the last whole block that was found.
            shared: another request holds it as well.
            follower: the request's own next block, if it may be cached by now.
        """
        node = self._table.node_of(block)
        if node is None or node.partial:
            return
        end = self._table.depths[block] + 1
        # Known already, as wherever paths part below a node: many may.
        if node.shared_to >= end:
            return
        inside = end - node.start
        after = node.blocks[inside : inside + 1] or (
            child.blocks[0] for child in node.children if not child.partial
        )
        if shared or any(other != follower for other in after):
            node.shared_to = end

    def let_go(self, block: int, depth: int, level: int = 0) -> list[int]:
        """Evict what only one path has used before others: O(those blocks).

        Only idle blocks at the end of the path, back to where another path has parted
        from it. Nothing, if another one goes on from its end. One that is used again is
        evicted in the order of all from then on.

        Args:
            block: the last whole block of the path.
            depth: blocks before it.
            level: from 0 to 15; the lower, the sooner.

        Returns:
            The blocks, those of a partial one at the end included.
        """
        table = self._table
        node = table.node_of(block)
        if node is None or node.partial or table.depths[block] != depth:
            return []
        if depth + 1 < node.start + len(node.blocks):
            return []
        if any(not child.partial for child in node.children) or len(node.children) > 1:
            return []
        ranks = table.ranks
        gone = [b for child in node.children for b in child.blocks if ranks[b] != HELD]
        if len(gone) < len(node.children):
            return []
        first = max(node.shared_to, node.pinned_to) - node.start
        for other in reversed(node.blocks[first:]):
            if other == HOLE or ranks[other] == HELD:
                break
            gone.append(other)
        self._evictor.let_go(gone, level)
        return gone
