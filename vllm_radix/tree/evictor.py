"""The order in which idle blocks are evicted, and what puts some first or last.

Ranks have bands, from the first to the last to go: partial blocks that were never hit;
what is of no use any more, as somebody said; all others; what is to be kept, as
somebody said; and what is pinned, for it is needed.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from vllm_radix.tree.block_table import HELD, BlockTable
from vllm_radix.tree.eviction import RANK_LIMIT
from vllm_radix.tree.node import HOLE, Node

UNHIT = -(1 << 62)
"""Added to the rank of a partial block that was never hit: it goes before all."""

DONE = -RANK_LIMIT
"""Added to the rank of what is of no use any more."""

KEEP = RANK_LIMIT
"""Added to the rank of a block that is to be kept."""

PIN = 2 * RANK_LIMIT
"""Added to the rank of a pinned block: it goes after all others."""

LEVEL = RANK_LIMIT >> 4
"""Between two levels of what goes first, or of what is kept: 0 to 15."""

_CLOCK = LEVEL - 1

_NO_LIMIT = 2 * PIN
_MIN_HEAP = 64


class Evictor:
    """A heap of the blocks that may be evicted, and the pins.

    The block that was released first goes first; ``ClassEvictor`` asks a policy.

    Args:
        table: where blocks are, and their ranks.

    Attributes:
        clock: releases so far.
        pins: how often each pinned block is pinned.
        kept: what is added to the rank of each block that is to be kept.
        on_unkept: called with each block that is no longer kept.
        on_kept_moved: called with a block that is kept no longer, and the one that is
            kept in its place, for it has the same tokens.
        num_idle: blocks that are cached and that no request uses.
        num_unhit: partial ones of them that were never hit.
        num_pinned_idle: idle blocks that are pinned, or lie before a pinned one.
        looks: entries of the heap that were taken off it, for tests of cost.
    """

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        # (rank, block) of evictable blocks; an entry is stale, and skipped, when the
        # block's rank has changed or it is not evictable any more.
        self.heap: list[tuple[int, int]] = []
        self._heap_limit = _MIN_HEAP
        self.clock = 0
        self.pins: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self.on_unkept: Callable[[int], None] | None = None
        self.on_kept_moved: Callable[[int, int], None] | None = None
        self.num_idle = 0
        self.num_unhit = 0
        self.num_pinned_idle = 0
        self.looks = 0

    # -- idle blocks -----------------------------------------------------------

    def hold(self, block: int) -> None:
        """Make an idle block held."""
        table = self._table
        node = table.nodes[block]
        assert node is not None
        self.num_unhit -= table.ranks[block] < DONE
        table.ranks[block] = HELD
        self.num_idle -= 1
        self.num_pinned_idle -= table.depths[block] < node.pinned_to

    def forget(self, block: int) -> None:
        """Make a block held and unpinned, before it leaves the tree."""
        if block in self.pins:
            self._drop_pin(block)
        self.unkeep(block)
        if self._table.ranks[block] != HELD:
            self.hold(block)

    def offer(self, block: int) -> None:
        """Note that an idle block at the end of a leaf may be evicted. O(log n)."""
        if len(self.heap) > self._heap_limit:
            self.heap = self._compacted(self.heap)
            # As many pushes again, before it is done again: O(1) each, amortised.
            self._heap_limit = max(_MIN_HEAP, 2 * len(self.heap))
        heappush(self.heap, (self._table.ranks[block], block))

    def _compacted(self, heap: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return a heap without its stale entries."""
        out = list({entry for entry in heap if self.is_current(*entry)})
        heapify(out)
        return out

    def offer_end(self, leaf: Node) -> None:
        """Offer the last block of a leaf, if it is idle."""
        block = leaf.blocks[-1]
        if self._table.ranks[block] != HELD:
            self.offer(block)

    def is_current(self, rank: int, block: int) -> bool:
        """Return whether an entry of the heap still says what may be evicted."""
        node = self._table.nodes[block]
        return (
            node is not None
            and self._table.ranks[block] == rank
            and not node.children
            and node.blocks[-1] == block
        )

    def offered(self) -> set[tuple[int, int]]:
        """Return the entries that say what may be evicted: O(n), for ``check``."""
        return {entry for entry in self.heap if self.is_current(*entry)}

    def pop_run(self, count: int, out: list[int]) -> Node | None:
        """Take up to ``count`` blocks off the end of one leaf, in order of eviction.

        As many as stay the lowest rank. O(log n), and O(1) per block.

        Args:
            count: how many blocks at most.
            out: where to append them.

        Returns:
            The leaf, not yet settled; None if no block may go.
        """
        heap = self.heap
        while heap:
            node = self._pop_current(heap)
            if node is not None:
                self._take(node, count, out, heap[0][0] if heap else _NO_LIMIT)
                return node
        return None

    def _pop_current(self, heap: list[tuple[int, int]]) -> Node | None:
        """Take the first entry off a heap; return its leaf, None if it was stale."""
        self.looks += 1
        rank, block = heappop(heap)
        node = self._table.nodes[block]
        # As is_current, which is a call.
        if (
            node is not None
            and self._table.ranks[block] == rank
            and not node.children
            and node.blocks[-1] == block
        ):
            return node
        return None

    def _take(self, node: Node, count: int, out: list[int], limit: int) -> None:
        """Take blocks off the end of a leaf: O(1) each.

        Args:
            node: the leaf; its last block may go.
            count: how many blocks at most.
            out: where to append them.
            limit: the highest rank that may go, of all but the last block.
        """
        table, run = self._table, node.blocks
        nodes, ranks = table.nodes, table.ranks
        end = node.start + len(run)
        last = run[-count:]
        last.reverse()
        self.num_unhit -= ranks[last[0]] < DONE
        limit = max(limit, ranks[last[0]])
        taken = 0
        for block in last:
            if block == HOLE:
                break
            rank = ranks[block]
            if rank == HELD or rank > limit:
                break
            if rank >= KEEP:
                self.pins.pop(block, None)
                if self.kept.pop(block, None) and self.on_unkept is not None:
                    self.on_unkept(block)
            nodes[block] = None
            ranks[block] = HELD
            run.pop()
            taken += 1
        out += last[:taken]
        table.num_cached -= taken
        self.num_idle -= taken
        left = end - taken
        if node.pinned_to > left:
            self.num_pinned_idle -= min(node.pinned_to, end) - left
            self._shrink_pinned(node)
        node.trimmed = True

    def drop(self, node: Node, depth: int) -> None:
        """Note that a block is about to leave a hole in an edge."""

    def idle_on_path(self, block: int, taken: dict[Node, int], take: bool) -> int:
        """See ``RadixTree.idle_on_path``."""
        table = self._table
        node = table.node_of(block)
        if node is None:
            return 0
        ranks, idle, end = table.ranks, 0, table.depths[block] + 1
        while node.parent is not None:
            run, start = node.blocks, node.start
            known = taken.get(node, 0)
            low, high = max(known - start, 0), end - start
            if low >= high:
                break
            if take:
                taken[node] = end
            while low < high:
                middle = (low + high) // 2
                if run[middle] == HOLE or ranks[run[middle]] != HELD:
                    high = middle
                else:
                    low = middle + 1
            idle += end - start - low
            if low:
                break
            end, node = start, node.parent
        return idle

    # -- pins ------------------------------------------------------------------

    def pin(self, block: int) -> None:
        """See ``RadixTree.pin``."""
        count = self.pins.get(block)
        if count is not None:
            self.pins[block] = count + 1
            return
        table = self._table
        node = table.node_of(block)
        if node is None or node.partial:
            return
        self.pins[block] = 1
        if table.ranks[block] != HELD:
            self._rerank(block, self._rank_of(block))
        end = table.depths[block] + 1
        # Blocks before a pinned one are pinned already: the walk ends there.
        while node.parent is not None and node.pinned_to < end:
            before = node.pinned_to
            self.num_pinned_idle += self._count_idle(node, before, end)
            node.pinned_to = end
            if before > node.start:
                break
            node.parent.pinned_children += 1
            end, node = node.start, node.parent

    def unpin(self, block: int) -> None:
        """Take back one ``pin`` of a block."""
        count = self.pins.get(block)
        if count is None:
            return
        if count > 1:
            self.pins[block] = count - 1
        else:
            self._drop_pin(block)

    def _drop_pin(self, block: int) -> None:
        """Remove all pins of a block."""
        table = self._table
        del self.pins[block]
        node = table.nodes[block]
        assert node is not None
        if table.ranks[block] >= PIN:
            self._rerank(block, self._rank_of(block))
        if node.pinned_to == table.depths[block] + 1:
            self._shrink_pinned(node)

    def _shrink_pinned(self, node: Node) -> None:
        """Find the last pinned block of an edge again, and of those above."""
        while node.parent is not None and not node.pinned_children:
            end = node.pinned_to
            at = min(end - node.start, len(node.blocks))
            while at > 0 and node.blocks[at - 1] not in self.pins:
                at -= 1
            node.pinned_to = node.start + at
            self.num_pinned_idle -= self._count_idle(node, node.pinned_to, end)
            if at or end == node.start:
                break
            node = node.parent
            node.pinned_children -= 1

    def _count_idle(self, node: Node, start: int, end: int) -> int:
        """Return the idle blocks of an edge from depth ``start`` to ``end``."""
        ranks = self._table.ranks
        return sum(
            block != HOLE and ranks[block] != HELD
            for block in node.blocks[start - node.start : end - node.start]
        )

    # -- what somebody says of blocks ------------------------------------------

    def keep(self, block: int, level: int) -> None:
        """Keep a block, in place of how it was kept before."""
        self.kept[block] = KEEP + level * LEVEL
        if self._table.ranks[block] != HELD:
            self._rerank(block, self._rank_of(block))

    def unkeep(self, block: int) -> None:
        """Keep a block no longer, if it was kept."""
        if self.kept.pop(block, None) is None:
            return
        if self._table.ranks[block] != HELD:
            self._rerank(block, self._rank_of(block))
        if self.on_unkept is not None:
            self.on_unkept(block)

    def let_go(self, blocks: list[int], level: int) -> None:
        """Let idle, unpinned blocks go before others, in their own order."""
        ranks = self._table.ranks
        for block in blocks:
            self.unkeep(block)
            if ranks[block] >= DONE:
                self._rerank(block, (ranks[block] & _CLOCK) + DONE + level * LEVEL)

    def _rank_of(self, block: int) -> int:
        """Return the rank of an idle whole block, pinned and kept as it is."""
        rank = (self._table.ranks[block] & _CLOCK) + self.kept.get(block, 0)
        return rank + PIN if block in self.pins else rank

    def _rerank(self, block: int, rank: int) -> None:
        """Give an idle block another rank."""
        self._table.ranks[block] = rank
        node = self._table.nodes[block]
        assert node is not None
        if not node.children and node.blocks[-1] == block:
            self.offer(block)
