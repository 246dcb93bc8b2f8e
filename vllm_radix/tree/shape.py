"""The nodes of a radix tree, and how they split, merge and go."""

from bisect import bisect_left
from collections.abc import Iterator

from vllm_radix.tree.block_table import BlockTable
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.runs import cut_runs, merge_runs, split_runs
from vllm_radix.tree.token_keys import common_units


class Shape:
    """A forest of edges, with one root per namespace.

    Args:
        block_bytes: bytes of a block's key.
        table: told where blocks go when an edge is split or merged.

    Attributes:
        roots: by namespace; a root has no blocks.
        namespace_of: the namespace of each root.
        num_nodes: edges, roots aside.
        num_partial: those of them that are a partial block.
        epoch: grows when probes taken before may have become wrong: a hole appears,
            or a trimmed leaf grows again, into other tokens.
        visited: nodes that operations have looked at, for tests of cost.
    """

    def __init__(self, block_bytes: int, table: BlockTable) -> None:
        self.block_bytes = block_bytes
        self._table = table
        self.roots: dict[Namespace, Node] = {}
        self.namespace_of: dict[Node, Namespace] = {}
        self.num_nodes = 0
        self.num_partial = 0
        self.epoch = 0
        self.visited = 0

    # -- finding ---------------------------------------------------------------

    def child(self, node: Node, key: bytes, depth: int) -> Node | None:
        """Return the child whose first block is block ``depth`` of ``key``."""
        at = depth * self.block_bytes
        first = key[at : at + self.block_bytes]
        index = bisect_left(node.child_keys, first)
        if index < len(node.child_keys) and node.child_keys[index] == first:
            return node.children[index]
        return None

    def shared_blocks(
        self, node: Node, inside: int, key: bytes, depth: int, end: int
    ) -> int:
        """Return how many blocks of an edge match ``key``.

        Args:
            node: the edge.
            inside: its first block to compare.
            key: the tokens to compare with.
            depth: the block of ``key`` to compare with that one.
            end: the block of ``key`` to end before.
        """
        size = self.block_bytes
        most = min(len(node.blocks) - inside, end - depth)
        whole = inside == 0 and most * size == len(node.key)
        if whole and key.startswith(node.key, depth * size):
            return most
        return min(most, common_units(node.key, inside * size, key, depth * size, size))

    def path_end(self, key: bytes, namespace: Namespace, depth: int) -> Node | None:
        """Return the node in which the first ``depth`` blocks of a key end, if any."""
        node = self.roots.get(namespace)
        while node is not None and node.start + len(node.blocks) < depth:
            at = node.start + len(node.blocks)
            self.visited += 1
            node = self.child(node, key, at)
            if node is not None:
                end = min(depth, at + len(node.blocks))
                if self.shared_blocks(node, 0, key, at, end) < end - at:
                    return None
        return node

    def nodes(self) -> Iterator[Node]:
        """Yield every node but the roots, parents first."""
        stack = [node for root in self.roots.values() for node in root.children[::-1]]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children[::-1])

    # -- changing --------------------------------------------------------------

    def root(self, namespace: Namespace) -> Node:
        """Return the root of a namespace, a new one if need be."""
        root = self.roots.get(namespace)
        if root is None:
            root = Node(None, b"", [], 0)
            self.roots[namespace] = root
            self.namespace_of[root] = namespace
        return root

    def link(self, parent: Node, key: bytes, blocks: list[int], depth: int) -> Node:
        """Add a leaf below ``parent`` and return it."""
        partial = len(key) < self.block_bytes
        child = Node(parent, key, blocks, depth, partial)
        first = bytes(key[: self.block_bytes])
        at = bisect_left(parent.child_keys, first)
        if parent.children:
            # Two paths part here; this stays known when one of them is gone.
            parent.shared_to = depth
        parent.children.insert(at, child)
        parent.child_keys.insert(at, first)
        self.num_nodes += 1
        self.num_partial += partial
        return child

    def unlink(self, node: Node) -> Node:
        """Take a leaf out of the tree; return its parent, not yet settled."""
        parent = node.parent
        assert parent is not None and not node.children
        at = bisect_left(parent.child_keys, node.key[: self.block_bytes])
        del parent.children[at], parent.child_keys[at]
        node.alive = False
        node.parent = None
        self.num_nodes -= 1
        self.num_partial -= node.partial
        return parent

    def prepare_to_grow(self, node: Node) -> None:
        """Prepare a leaf for what comes below it."""
        self.cut(node)
        cut_runs(node)
        node.shared_to = min(node.shared_to, node.start + len(node.blocks))
        if node.trimmed:
            # A probe may end in what was here before.
            self.epoch += 1
            node.trimmed = False

    def extend(self, node: Node, tokens: bytes, blocks: list[int]) -> None:
        """Make a leaf's edge longer: O(what is added), amortised."""
        self.prepare_to_grow(node)
        if isinstance(node.key, bytes):
            node.key = bytearray(node.key)
        node.key += tokens
        node.blocks += blocks

    def cut(self, node: Node) -> None:
        """Cut off the part of the key whose blocks were trimmed."""
        length = len(node.blocks) * self.block_bytes
        if len(node.key) > length:
            node.key = node.key[:length]

    def split(self, node: Node, at: int) -> Node:
        """Split an edge before its block ``at``; return the upper part.

        O(at): the upper part is the new node, so that the children of the lower one
        keep their parent.
        """
        parent = node.parent
        assert parent is not None and 0 < at < len(node.blocks)
        self.cut(node)
        cut_runs(node)
        size = self.block_bytes
        upper = Node(parent, node.key[: at * size], node.blocks[:at], node.start)
        upper.children = [node]
        upper.child_keys = [bytes(node.key[at * size : (at + 1) * size])]
        parent.children[bisect_left(parent.child_keys, upper.key[:size])] = upper
        node.parent = upper
        node.key = node.key[at * size :]
        node.blocks = node.blocks[at:]
        node.start += at
        upper.pinned_to = min(node.pinned_to, node.start)
        node.pinned_to = max(node.pinned_to, node.start)
        node.shared_to = max(node.shared_to, node.start)
        upper.pinned_children = int(node.pinned_to > node.start)
        if node.holes:
            upper.holes = upper.blocks.count(HOLE)
            node.holes -= upper.holes
        split_runs(upper, node)
        self._table.move(upper.blocks, upper)
        self.num_nodes += 1
        return upper

    def settle(self, node: Node) -> Node | None:
        """Put a node that lost blocks or children in order, and those above it.

        Returns:
            The leaf that this ends at, whose last block may be evictable now; None
            if it ends at a node with children, or the namespace is gone.
        """
        while not node.children:
            while node.blocks and node.blocks[-1] == HOLE:
                node.blocks.pop()
                node.holes -= 1
                node.trimmed = True
            if node.blocks:
                # Cut when half is gone: O(1) per block trimmed, amortised.
                if len(node.key) > 2 * len(node.blocks) * self.block_bytes:
                    self.cut(node)
                return node
            if node.parent is None:
                del self.roots[self.namespace_of.pop(node)]
                node.alive = False
                return None
            node = self.unlink(node)
        if len(node.children) == 1 and node.parent is not None:
            (child,) = node.children
            if not child.partial:
                self.merge(node, child)
        return None

    def merge(self, node: Node, child: Node) -> None:
        """Join a node with its only child: O(blocks of the child)."""
        self.cut(node)
        self.cut(child)
        merge_runs(node, child)
        self._table.move(child.blocks, node)
        node.key = bytes(node.key) + bytes(child.key)
        if child.pinned_to > child.start:
            node.pinned_to = child.pinned_to
        node.pinned_children = child.pinned_children
        if child.shared_to > child.start:
            node.shared_to = child.shared_to
        node.blocks += child.blocks
        node.holes += child.holes
        node.children, node.child_keys = child.children, child.child_keys
        node.trimmed = child.trimmed
        for below in node.children:
            below.parent = node
        child.alive = False
        child.parent = None
        self.num_nodes -= 1
