"""The shape of a radix tree: its nodes, where each block is, what may go next.

``RadixTree`` builds its operations from these. A part of it, not for others.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heappush

from vllm_radix.tree.base import Namespace, PrefixCache
from vllm_radix.tree.eviction import LRU, EvictionPolicy
from vllm_radix.tree.history import History
from vllm_radix.tree.keys import common_units
from vllm_radix.tree.news import News
from vllm_radix.tree.node import HOLE, Node

HELD = -1
"""In place of a rank: the block is held, or blank."""

TAIL = -(1 << 62)
"""Added to the rank of a partial block that nobody has hit: it goes before all."""

PIN = 1 << 61
"""Ranks from here on are of pinned blocks."""

_MIN_HEAP = 64


class Structure(PrefixCache):
    """Nodes, a table of blocks, and a heap of those that may be evicted.

    Args:
        block_size: tokens in a block.
        policy: ranks idle blocks for eviction.

    Attributes:
        visited: nodes that operations have looked at, for tests of cost.
        history: what was evicted, when somebody wants to know why a prompt was
            not found; None keeps nothing.
        news: what changed since its reader cleared it; None, as at first, notes
            nothing.
    """

    def __init__(self, block_size: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__(block_size)
        self.policy = policy or LRU()
        self.visited = 0
        self.history: History | None = None
        self.news: News | None = None
        self._forget()

    def _forget(self) -> None:
        self._roots: dict[Namespace, Node] = {}
        self._namespace_of: dict[Node, Namespace] = {}
        # By block id; arrays, as an object a block would be work for the garbage
        # collector. Depth is counted from the root, so that a split, which moves
        # blocks between nodes, leaves it alone.
        self._node: list[Node | None] = []
        self._depth = array("i")
        self._rank = array("q")
        # (rank, block) of evictable blocks; an entry is stale, and skipped,
        # when the block's rank has changed or it is not evictable any more.
        self._heap: list[tuple[int, int]] = []
        self._spares: dict[int, list[int]] = {}
        self._spare_of: dict[int, int] = {}
        self._clock = 0
        # How often each pinned block is pinned, and the idle blocks that are pinned
        # or lie before a pinned one.
        self._pins: dict[int, int] = {}
        self._num_pinned_idle = 0
        # Grows when probes taken before may have become wrong: a hole appears,
        # or a trimmed leaf grows again, into other tokens.
        self._epoch = 0
        self._num_nodes = 0
        self._num_cached = 0
        self._num_idle = 0
        self._num_partial = 0
        self._num_tails = 0
        if self.history is not None:
            self.history.clear()
        if self.news is not None:
            self.news.reshaped = True

    # -- finding ---------------------------------------------------------------

    def _child(self, node: Node, key: bytes, depth: int) -> Node | None:
        """Return the child whose first block is block ``depth`` of ``key``."""
        at = depth * self.block_bytes
        first = key[at : at + self.block_bytes]
        index = bisect_left(node.first, first)
        if index < len(node.first) and node.first[index] == first:
            return node.children[index]
        return None

    def _shared(
        self, node: Node, inside: int, key: bytes, depth: int, wanted: int
    ) -> int:
        """Return how many blocks of the edge after ``inside`` match ``key``."""
        size = self.block_bytes
        most = min(len(node.blocks) - inside, wanted - depth)
        whole = inside == 0 and most * size == len(node.key)
        if whole and key.startswith(node.key, depth * size):
            return most
        return min(most, common_units(node.key, inside * size, key, depth * size, size))

    def _node_before(self, blocks: Sequence[int], start: int) -> Node | None:
        """Return the node of block ``start - 1``, if it is where it should be."""
        if start == 0 or not 0 <= blocks[start - 1] < len(self._node):
            return None
        node = self._node[blocks[start - 1]]
        # Not if the id has since been given to another place of another path.
        if node is None or self._depth[blocks[start - 1]] != start - 1:
            return None
        # Nor if the block was never published as the full one it is by now.
        return None if self._is_partial(node) else node

    def _path_end(self, key: bytes, namespace: Namespace, depth: int) -> Node | None:
        """Return the node at which a path of ``depth`` blocks ends, if known."""
        node = self._roots.get(namespace)
        while node is not None and node.start + len(node.blocks) < depth:
            at = node.start + len(node.blocks)
            self.visited += 1
            node = self._child(node, key, at)
            if node is not None:
                wanted = min(depth, at + len(node.blocks))
                if self._shared(node, 0, key, at, wanted) < wanted - at:
                    return None
        return node

    def _node_of(self, block: int) -> Node | None:
        """Return the node that a block is in, if any."""
        return self._node[block] if 0 <= block < len(self._node) else None

    def _is_partial(self, node: Node) -> bool:
        return 0 < len(node.key) < self.block_bytes

    # -- the table of blocks ---------------------------------------------------

    def _grow(self, size: int) -> None:
        missing = size - len(self._node)
        if missing > 0:
            self._node += [None] * missing
            self._depth.frombytes(bytes(missing * self._depth.itemsize))
            self._rank.extend(array("q", [HELD]) * missing)

    def _own(self, block: int, node: Node, depth: int) -> None:
        self._node[block] = node
        self._depth[block] = depth
        self._rank[block] = HELD
        self._num_cached += 1

    def _own_all(self, blocks: list[int], node: Node, depth: int) -> None:
        """Own a run of blocks, the first one at ``depth``."""
        nodes, depths, ranks = self._node, self._depth, self._rank
        for block in blocks:
            nodes[block] = node
            depths[block] = depth
            ranks[block] = HELD
            depth += 1
        self._num_cached += len(blocks)

    def _disown(self, block: int) -> None:
        if block in self._pins:
            self._drop_pin(block)
        if self._rank[block] != HELD:
            self._hold(block)
        self._node[block] = None
        self._num_cached -= 1
        if self.history is not None:
            self.history.forget(block)
        if self.news is not None:
            self.news.gone.append(block)

    def _hold(self, block: int) -> None:
        """Make an idle block held."""
        node = self._node[block]
        assert node is not None
        self._num_tails -= self._rank[block] < HELD
        self._rank[block] = HELD
        self._num_idle -= 1
        self._num_pinned_idle -= self._depth[block] < node.pinned_to

    def _drop_spare(self, block: int) -> None:
        there = self._spare_of.pop(block)
        spares = self._spares[there]
        spares.remove(block)
        if not spares:
            del self._spares[there]

    def _promote(self, block: int) -> None:
        """Put a spare in the place of ``block``, which goes blank."""
        spare, *others = self._spares.pop(block)
        del self._spare_of[spare]
        node, depth = self._node[block], self._depth[block]
        assert node is not None
        self._disown(block)
        node.blocks[depth - node.start] = spare
        self._own(spare, node, depth)
        if others:
            self._spares[spare] = others
            for other in others:
                self._spare_of[other] = spare

    # -- changing the shape ----------------------------------------------------

    def _root(self, namespace: Namespace) -> Node:
        """Return the root of a namespace, a new one if need be."""
        root = self._roots.get(namespace)
        if root is None:
            root = Node(None, b"", [], 0)
            self._roots[namespace] = root
            self._namespace_of[root] = namespace
        return root

    def _link(self, parent: Node, key: bytes, blocks: list[int], depth: int) -> Node:
        """Add a leaf below ``parent``."""
        child = Node(parent, key, blocks, depth)
        first = bytes(key[: self.block_bytes])
        at = bisect_left(parent.first, first)
        parent.children.insert(at, child)
        parent.first.insert(at, first)
        self._num_nodes += 1
        self._num_partial += self._is_partial(child)
        return child

    def _unlink(self, node: Node) -> Node:
        """Take a leaf out of the tree; return its parent, not yet settled."""
        parent = node.parent
        assert parent is not None and not node.children
        at = bisect_left(parent.first, node.key[: self.block_bytes])
        del parent.children[at], parent.first[at]
        node.alive = False
        node.parent = None
        self._num_nodes -= 1
        self._num_partial -= self._is_partial(node)
        return parent

    def _regrow(self, node: Node) -> None:
        """Prepare a leaf for what comes below it."""
        self._cut(node)
        if node.trimmed:
            # A probe may end in what was here before.
            self._epoch += 1
            node.trimmed = False

    def _cut(self, node: Node) -> None:
        """Cut off the part of the key whose blocks were trimmed."""
        length = len(node.blocks) * self.block_bytes
        if len(node.key) > length:
            node.key = node.key[:length]

    def _split(self, node: Node, at: int) -> Node:
        """Split an edge before its block ``at``; return the upper part.

        O(at): the upper part is the new node, so that the children of the
        lower one keep their parent.
        """
        parent = node.parent
        assert parent is not None and 0 < at < len(node.blocks)
        self._cut(node)
        size = self.block_bytes
        upper = Node(parent, node.key[: at * size], node.blocks[:at], node.start)
        upper.children = [node]
        upper.first = [bytes(node.key[at * size : (at + 1) * size])]
        parent.children[bisect_left(parent.first, upper.key[:size])] = upper
        node.parent = upper
        node.key = node.key[at * size :]
        node.blocks = node.blocks[at:]
        node.start += at
        upper.pinned_to = min(node.pinned_to, node.start)
        node.pinned_to = max(node.pinned_to, node.start)
        upper.pinned_children = int(node.pinned_to > node.start)
        if node.holes:
            upper.holes = upper.blocks.count(HOLE)
            node.holes -= upper.holes
        for block in upper.blocks:
            if block != HOLE:
                self._node[block] = upper
        self._num_nodes += 1
        return upper

    def _settle(self, node: Node) -> None:
        """Put a node that lost blocks or children in order, and those above."""
        while not node.children:
            while node.blocks and node.blocks[-1] == HOLE:
                node.blocks.pop()
                node.holes -= 1
                node.trimmed = True
            if node.blocks:
                # Cut when half is gone: O(1) per block trimmed, amortised.
                if len(node.key) > 2 * len(node.blocks) * self.block_bytes:
                    self._cut(node)
                if self._rank[node.blocks[-1]] != HELD:
                    self._offer(node.blocks[-1])
                return
            if node.parent is None:
                del self._roots[self._namespace_of.pop(node)]
                node.alive = False
                return
            node = self._unlink(node)
        if len(node.children) == 1 and node.parent is not None:
            (child,) = node.children
            if not self._is_partial(child):
                self._merge(node, child)

    def _merge(self, node: Node, child: Node) -> None:
        """Join a node with its only child: O(blocks of the child)."""
        self._cut(node)
        self._cut(child)
        for block in child.blocks:
            if block != HOLE:
                self._node[block] = node
        node.key = bytes(node.key) + bytes(child.key)
        if child.pinned_to > child.start:
            node.pinned_to = child.pinned_to
        node.pinned_children = child.pinned_children
        node.blocks += child.blocks
        node.holes += child.holes
        node.children, node.first = child.children, child.first
        node.trimmed = child.trimmed
        for below in node.children:
            below.parent = node
        child.alive = False
        child.parent = None
        self._num_nodes -= 1

    def _partial_at(self, block: int, depth: int) -> Node | None:
        """Return the node of a block that is cached as a partial one there."""
        node = self._node_of(block)
        if node is None or not self._is_partial(node) or node.start != depth:
            return None
        return node

    def _unfile(self, node: Node) -> None:
        """Take a partial block out of the tree."""
        self._disown(node.blocks[0])
        self._settle(self._unlink(node))

    # -- what may be evicted ---------------------------------------------------

    def pin(self, block: int) -> None:
        """Evict a block last, and so the blocks before it on its path.

        O(1) for a block that is pinned already; else O(nodes above it whose blocks
        were not pinned, and their blocks).
        """
        count = self._pins.get(block)
        if count is not None:
            self._pins[block] = count + 1
            return
        node = self._node_of(block)
        if node is None or self._is_partial(node):
            return
        self._pins[block] = 1
        if self._rank[block] != HELD:
            self._rerank(block, self._rank[block] + PIN)
        end = self._depth[block] + 1
        # Blocks before a pinned one are pinned already: the walk ends there.
        while node.parent is not None and node.pinned_to < end:
            before = node.pinned_to
            self._num_pinned_idle += self._count_idle(node, before, end)
            node.pinned_to = end
            if before > node.start:
                break
            node.parent.pinned_children += 1
            end, node = node.start, node.parent

    def unpin(self, block: int) -> None:
        """Take back one ``pin`` of a block; O as for ``pin``."""
        count = self._pins.get(block)
        if count is None:
            return
        if count > 1:
            self._pins[block] = count - 1
        else:
            self._drop_pin(block)

    def pinned_blocks(self) -> set[int]:
        """Return the pinned blocks: O(n)."""
        return set(self._pins)

    def _drop_pin(self, block: int) -> None:
        """Remove all pins of a block."""
        del self._pins[block]
        node = self._node[block]
        assert node is not None
        if self._rank[block] >= PIN:
            self._rerank(block, self._rank[block] - PIN)
        if node.pinned_to == self._depth[block] + 1:
            self._shrink_pinned(node)

    def _shrink_pinned(self, node: Node) -> None:
        """Find the last pinned block of an edge again, and of those above."""
        while node.parent is not None and not node.pinned_children:
            end = node.pinned_to
            at = min(end - node.start, len(node.blocks))
            while at > 0 and node.blocks[at - 1] not in self._pins:
                at -= 1
            node.pinned_to = node.start + at
            self._num_pinned_idle -= self._count_idle(node, node.pinned_to, end)
            if at or end == node.start:
                break
            node = node.parent
            node.pinned_children -= 1

    def _count_idle(self, node: Node, start: int, end: int) -> int:
        """Return the idle blocks of an edge from depth ``start`` to ``end``."""
        ranks = self._rank
        return sum(
            block != HOLE and ranks[block] != HELD
            for block in node.blocks[start - node.start : end - node.start]
        )

    def _rerank(self, block: int, rank: int) -> None:
        """Give an idle block another rank."""
        self._rank[block] = rank
        node = self._node[block]
        assert node is not None
        if not node.children and node.blocks[-1] == block:
            self._offer(block)

    def _offer(self, block: int) -> None:
        """Note that a block is evictable."""
        if len(self._heap) > max(_MIN_HEAP, 2 * self._num_nodes):
            self._heap = list({e for e in self._heap if self._is_current(*e)})
            heapify(self._heap)
        heappush(self._heap, (self._rank[block], block))

    def _is_current(self, rank: int, block: int) -> bool:
        node = self._node[block]
        return (
            node is not None
            and self._rank[block] == rank
            and not node.children
            and node.blocks[-1] == block
        )
