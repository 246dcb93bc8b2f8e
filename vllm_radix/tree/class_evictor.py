"""The order of eviction by a policy with classes."""

from heapq import heappop, heappush

from vllm_radix.tree.block_table import HELD, BlockTable
from vllm_radix.tree.eviction import NEVER, EvictionPolicy, Queues
from vllm_radix.tree.evictor import DONE, KEEP, PIN, Evictor
from vllm_radix.tree.node import Node
from vllm_radix.tree.reuse import ReuseAccount
from vllm_radix.tree.runs import END, TOUCHED_AT, runs_of
from vllm_radix.tree.shape import Shape

_MIN_HEAP = 64


class ClassEvictor(Evictor):
    """A heap of evictable blocks for each class, and more around them.

    Partial blocks that were never hit, and what is of no use any more, go before all
    classes; what is to be kept, and pinned blocks, after them: none of that is the
    policy's business.

    Args:
        policy: sorts blocks into classes, and picks the next one.
        table: where blocks are, and their ranks.
        shape: the nodes.

    Attributes:
        account: of uses, for the policy.
    """

    def __init__(self, policy: EvictionPolicy, table: BlockTable, shape: Shape) -> None:
        super().__init__(table)
        self.policy = policy
        classes = policy.num_classes
        self._first, self._done = classes, classes + 1
        self._kept, self._last = classes + 2, classes + 3
        self._heaps: list[list[tuple[int, int]]] = [[] for _ in range(classes + 4)]
        self._limits = [_MIN_HEAP] * (classes + 4)
        self.queues = Queues(classes)
        self.account = ReuseAccount(policy, table, shape, self.queues)
        # When all classes were last looked at.
        self._seen_at = -1
        # The class that gave the last blocks, whose oldest block is to be shown.
        self._popped = -1

    def offered(self) -> set[tuple[int, int]]:
        """Return the entries that say what may be evicted: O(n), for ``check``."""
        self.account.check()
        return {
            entry for heap in self._heaps for entry in heap if self.is_current(*entry)
        }

    def offer(self, block: int) -> None:
        """Note that an idle block at the end of a leaf may be evicted. O(log n)."""
        table = self._table
        rank, node = table.ranks[block], table.nodes[block]
        assert node is not None
        if rank < HELD:
            at = self._first if rank < DONE else self._done
        elif rank >= KEEP:
            at = self._kept if rank < PIN else self._last
        else:
            at = self.account.class_of_end(node)
        heap = self._heaps[at]
        if len(heap) > self._limits[at]:
            heap = self._heaps[at] = self._compacted(heap)
            self._limits[at] = max(_MIN_HEAP, 2 * len(heap))
        heappush(heap, (rank, block))
        if at < self._first and rank < self.queues.ranks[at]:
            self._show_oldest(at)

    def _show_oldest(self, label: int) -> None:
        """Show the policy the oldest block of a class: O(entries that are stale)."""
        heap, queues = self._heaps[label], self.queues
        while heap and not self.is_current(*heap[0]):
            heappop(heap)
            self.looks += 1
        rank, before = heap[0][0] if heap else NEVER, queues.ranks[label]
        if rank == before:
            return
        if rank == NEVER:
            queues.open.discard(label)
        elif before == NEVER:
            queues.open.add(label)
        queues.ranks[label] = rank
        queues.changed.add(label)
        if heap:
            node = self._table.nodes[heap[0][1]]
            assert node is not None
            queues.released[label] = (runs_of(node)[-1] >> TOUCHED_AT) - 1

    def _next(self) -> int | None:
        """Return the number of the heap to take from; None if all are empty."""
        queues = self.queues
        for at in (self._first, self._done):
            if self._heaps[at]:
                return at
        if self._popped >= 0:
            self._show_oldest(self._popped)
            self._popped = -1
        if self._seen_at != queues.now:
            self._seen_at = queues.now
            for label in tuple(queues.open):
                oldest = self._heaps[label][0]
                if oldest[0] != queues.ranks[label] or not self.is_current(*oldest):
                    self._show_oldest(label)
        if queues.open:
            label = self.policy.pick(queues)
            if queues.ranks[label] == NEVER:
                raise ValueError(
                    f"eviction policy {self.policy.name!r} picked class {label}, which "
                    "has no block to evict; allowed: one with a rank below NEVER"
                )
            return label
        for at in (self._kept, self._last):
            if self._heaps[at]:
                return at
        return None

    def pop_run(self, count: int, out: list[int]) -> Node | None:
        """Take up to ``count`` blocks off the end of one leaf, in order of eviction.

        As many as are of one run, and stay the oldest of their class; kept and pinned
        blocks have their turn. O(log n) and O(classes), and O(1) per block.

        Args:
            count: how many blocks at most.
            out: where to append them.

        Returns:
            The leaf, not yet settled; None if no block may go.
        """
        while (at := self._next()) is not None:
            heap = self._heaps[at]
            node = self._pop_current(heap)
            if node is not None:
                limit = KEEP - 1
                if at >= self._done:
                    limit = HELD if at == self._done else NEVER
                if heap and heap[0][0] < limit:
                    limit = heap[0][0]
                runs, end = runs_of(node), node.start + len(node.blocks)
                begin = runs[-2] & END if len(runs) > 1 else node.start
                run, before = runs[-1], len(out)
                self._take(node, min(count, end - begin), out, limit)
                self.account.evicted(node, run, len(out) - before, at < self._first)
            if at < self._first:
                self._popped = at
            if node is not None:
                return node
        return None

    def drop(self, node: Node, depth: int) -> None:
        """Note that a block is about to leave a hole in an edge."""
        self.account.drop(node, depth)
