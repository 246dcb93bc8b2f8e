"""A path-compressed radix tree of token blocks.

Each node is an edge: a run of whole blocks that no other path shares in part::

    root --[sys0 sys1]--+--[userA0 userA1 userA2]
                        +--[userB0]--+--[...]
                                     +--[...]

``key`` holds the run's tokens and ``blocks`` its block ids, so that a match
costs one memcmp per node. Children are sorted by their first block, which
siblings never share. The structure is that of RadixAttention (Zheng et al.,
"SGLang: Efficient Execution of Structured Language Model Programs", 2024),
with whole blocks as letters, eviction block by block, and duplicates.

Costs below: L bytes compared, d nodes on the path, n nodes in the tree.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from vllm_radix.tree.base import Match, Namespace, PrefixCache, Stats
from vllm_radix.tree.eviction import LRU, EvictionPolicy
from vllm_radix.tree.keys import common_units, decode
from vllm_radix.tree.node import HOLE, Node

HELD = -1
"""In place of a rank: the block is held, or blank."""

_MIN_HEAP = 64


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


class RadixTree(PrefixCache):
    """A prefix cache as a radix tree; see ``PrefixCache`` for its rules.

    Args:
        block_size: tokens in a block.
        policy: ranks idle blocks for eviction.

    Attributes:
        visited: nodes that operations have looked at, for tests of cost.

    >>> from vllm_radix.tree import encode
    >>> tree = RadixTree(block_size=2)
    >>> tree.insert(encode([1, 2, 3, 4]), [10, 11])
    []
    >>> tree.match(encode([1, 2, 9, 9])).blocks
    (10,)
    >>> tree.release([11, 10])  # the request is done; its tail goes first
    []
    >>> tree.evict(1)
    [11]
    """

    def __init__(self, block_size: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__(block_size)
        self.policy = policy or LRU()
        self.visited = 0
        self._forget()

    def _forget(self) -> None:
        self._roots: dict[Namespace, Node] = {}
        self._namespace_of: dict[Node, Namespace] = {}
        # By block id. Depth is counted from the root, so that a split, which
        # moves blocks between nodes, leaves it alone.
        self._node: list[Node | None] = []
        self._depth: list[int] = []
        self._rank: list[int] = []
        # (rank, block) of evictable blocks; an entry is stale, and skipped,
        # when the block's rank has changed or it is not evictable any more.
        self._heap: list[tuple[int, int]] = []
        self._spares: dict[int, list[int]] = {}
        self._spare_of: dict[int, int] = {}
        self._clock = 0
        # Grows when probes taken before may have become wrong: a hole appears,
        # or a trimmed leaf grows again, into other tokens.
        self._epoch = 0
        self._num_nodes = 0
        self._num_cached = 0
        self._num_idle = 0

    # -- reading ---------------------------------------------------------------

    def match(
        self, key: bytes, namespace: Namespace = None, limit: int | None = None
    ) -> Match:
        """Return the longest cached prefix: O(L in memcmp + d log fan-out)."""
        found: list[int] = []
        wanted = len(key) // self.block_bytes
        if limit is not None:
            wanted = min(wanted, limit)
        node = self._roots.get(namespace)
        while node is not None and len(found) < wanted:
            node, length = self._step(node, key, len(found), wanted)
            if node is not None:
                run = node.blocks[:length]
                if HOLE in run:
                    found += run[: run.index(HOLE)]
                    break
                found += run
                if length < len(node.blocks):
                    break
        return Match(tuple(found))

    def probe(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        last: Probe | None = None,
    ) -> Probe | None:
        """Return the length of the cached prefix, cheaply again and again.

        Args:
            key: as for ``match``.
            namespace: as for ``match``.
            limit: as for ``match``.
            last: the previous answer for the same arguments. While the path it
                found still stands, only what is below it is looked at: O(1)
                when nothing changed.

        Returns:
            The probe, or None when the namespace is empty.
        """
        wanted = len(key) // self.block_bytes
        if limit is not None:
            wanted = min(wanted, limit)
        root = self._roots.get(namespace)
        if root is None:
            return None
        node, depth = root, 0
        if last is not None and last._epoch == self._epoch and last._node.alive:
            node = last._node
            # A split may have moved the end of the match to a node above.
            while node.parent is not None and node.start >= last.num_blocks:
                self.visited += 1
                node = node.parent
            depth = last.num_blocks
            if depth > node.start + len(node.blocks):
                node, depth = root, 0  # trimmed since
        while True:
            inside = depth - node.start
            if inside < len(node.blocks):
                # Go on along this edge, as far as it is cached.
                self.visited += 1
                length = inside + self._shared(node, inside, key, depth, wanted)
                run = node.blocks[inside:length]
                if HOLE in run:
                    return Probe(node, depth + run.index(HOLE), self._epoch)
                depth = node.start + length
                if length < len(node.blocks):
                    break
            if depth >= wanted:
                break
            below = self._child(node, key, depth)
            if below is None:
                break
            node = below
        return Probe(node, depth, self._epoch)

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

    def _step(
        self, node: Node, key: bytes, depth: int, wanted: int
    ) -> tuple[Node | None, int]:
        """Go one edge down: return it and how many of its blocks match."""
        self.visited += 1
        child = self._child(node, key, depth)
        if child is None:
            return None, 0
        return child, self._shared(child, 0, key, depth, wanted)

    # -- inserting -------------------------------------------------------------

    def insert(
        self,
        key: bytes,
        blocks: Sequence[int],
        namespace: Namespace = None,
        start: int = 0,
    ) -> list[int]:
        """Cache ``blocks[start:]``: as a match, plus O(what is new).

        Block ``start - 1`` leads straight to its node when it is cached, so
        that a request which fills one more block pays for that block alone.
        """
        self._checked_insert(key, blocks, start)
        total = len(blocks)
        if start >= total:
            return []
        size = self.block_bytes
        self._grow(max(blocks[start:]) + 1)
        self.version += 1
        freed: list[int] = []

        node = self._node_before(blocks, start)
        depth = start
        if node is None:
            node = self._roots.get(namespace)
            depth = 0
            if node is None:
                node = Node(None, b"", [], 0)
                self._roots[namespace] = node
                self._namespace_of[node] = namespace
        while depth < total:
            inside = depth - node.start
            if inside < len(node.blocks):
                shared = self._shared(node, inside, key, depth, total)
                for index in range(inside, inside + shared):
                    if node.start + index >= start:
                        self._place(node, index, blocks[node.start + index], freed)
                depth += shared
                if depth < total and inside + shared < len(node.blocks):
                    node = self._split(node, inside + shared)
                continue
            self.visited += 1
            below = self._child(node, key, depth)
            if below is not None:
                node = below
                continue
            new = [HOLE if i < start else blocks[i] for i in range(depth, total)]
            tokens = key[depth * size : total * size]
            if node.parent is not None and not node.children:
                self._cut(node)
                if node.trimmed:
                    # A probe may end in what was here before.
                    self._epoch += 1
                    node.trimmed = False
                node.key += tokens
                node.blocks += new
            else:
                child = Node(node, tokens, new, depth)
                at = bisect_left(node.first, tokens[:size])
                node.children.insert(at, child)
                node.first.insert(at, tokens[:size])
                self._num_nodes += 1
                node = child
            for index in range(max(depth, start), total):
                self._own(blocks[index], node, index)
            depth = total
        return freed

    def _node_before(self, blocks: Sequence[int], start: int) -> Node | None:
        if start == 0 or not 0 <= blocks[start - 1] < len(self._node):
            return None
        node = self._node[blocks[start - 1]]
        # Not if the id has since been given to another place of another path.
        if node is None or self._depth[blocks[start - 1]] != start - 1:
            return None
        return node

    def _grow(self, size: int) -> None:
        missing = size - len(self._node)
        if missing > 0:
            self._node += [None] * missing
            self._depth += [0] * missing
            self._rank += [HELD] * missing

    def _own(self, block: int, node: Node, depth: int) -> None:
        self._node[block] = node
        self._depth[block] = depth
        self._rank[block] = HELD
        self._num_cached += 1

    def _disown(self, block: int) -> None:
        self._node[block] = None
        self._num_cached -= 1
        if self._rank[block] != HELD:
            self._rank[block] = HELD
            self._num_idle -= 1

    def _place(self, node: Node, index: int, block: int, freed: list[int]) -> None:
        """Put a held block where the path already is."""
        there = node.blocks[index]
        if there != HOLE and self._rank[there] == HELD:
            self._spares.setdefault(there, []).append(block)
            self._spare_of[block] = there
            return
        if there != HOLE:
            self._disown(there)
            freed.append(there)
        node.blocks[index] = block
        self._own(block, node, node.start + index)

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
        upper.first = [node.key[at * size : (at + 1) * size]]
        parent.children[bisect_left(parent.first, upper.key[:size])] = upper
        node.parent = upper
        node.key = node.key[at * size :]
        node.blocks = node.blocks[at:]
        node.start += at
        for block in upper.blocks:
            if block != HOLE:
                self._node[block] = upper
        self._num_nodes += 1
        return upper

    # -- holding and letting go ------------------------------------------------

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held, O(1) each."""
        for block in blocks:
            if block < len(self._rank) and self._rank[block] != HELD:
                self._rank[block] = HELD
                self._num_idle -= 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle, O(1) each and O(log n) per leaf."""
        freed: list[int] = []
        for block in blocks:
            if block in self._spare_of:
                self._drop_spare(block)
                freed.append(block)
                continue
            node = self._node[block] if block < len(self._node) else None
            if node is None or self._rank[block] != HELD:
                continue
            if block in self._spares:
                self._promote(block)
                freed.append(block)
                continue
            depth = self._depth[block]
            self._rank[block] = self.policy.rank(self._clock, depth)
            self._clock += 1
            self._num_idle += 1
            if not node.children and node.blocks[-1] == block:
                self._offer(block)
        return freed

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

    def evict(self, count: int) -> list[int]:
        """Evict, O(log n) per run of blocks and O(1) per block of it.

        A node left with one child is joined with it: O(blocks of the child).
        """
        out: list[int] = []
        heap = self._heap
        while heap and len(out) < count:
            rank, block = heappop(heap)
            self.visited += 1
            if not self._is_current(rank, block):
                continue
            node = self._node[block]
            assert node is not None
            # One edge's tail at a time, while it stays the lowest rank.
            following = heap[0][0] if heap else None
            while len(out) < count:
                self._disown(block)
                out.append(block)
                node.blocks.pop()
                self._trim_holes(node)
                if not node.blocks:
                    break
                block = node.blocks[-1]
                rank = self._rank[block]
                if rank == HELD or (following is not None and rank > following):
                    break
            self._settle(node)
            heap = self._heap
        if out:
            self.version += 1
        return out

    def _trim_holes(self, node: Node) -> None:
        while node.blocks and node.blocks[-1] == HOLE:
            node.blocks.pop()

    def _settle(self, node: Node) -> None:
        """Put a leaf that lost blocks in order, and the nodes above it."""
        while not node.children:
            self._trim_holes(node)
            parent = node.parent
            if node.blocks:
                node.trimmed = True
                # Cut when half is gone: O(1) per block trimmed, amortised.
                if len(node.key) > 2 * len(node.blocks) * self.block_bytes:
                    self._cut(node)
                if self._rank[node.blocks[-1]] != HELD:
                    self._offer(node.blocks[-1])
                return
            if parent is None:
                del self._roots[self._namespace_of.pop(node)]
                node.alive = False
                return
            at = bisect_left(parent.first, node.key[: self.block_bytes])
            del parent.children[at], parent.first[at]
            node.alive = False
            node.parent = None
            self._num_nodes -= 1
            node = parent
        if len(node.children) == 1 and node.parent is not None:
            self._merge(node)

    def _merge(self, node: Node) -> None:
        """Join a node with its only child: O(blocks of the child)."""
        (child,) = node.children
        self._cut(node)
        self._cut(child)
        for block in child.blocks:
            if block != HOLE:
                self._node[block] = node
        node.key += child.key
        node.blocks += child.blocks
        node.children, node.first = child.children, child.first
        node.trimmed = child.trimmed
        for below in node.children:
            below.parent = node
        child.alive = False
        child.parent = None
        self._num_nodes -= 1

    def discard(self, block: int) -> bool:
        """Let go of one block, leaving a hole if need be: O(edge)."""
        if block in self._spare_of:
            self._drop_spare(block)
            return True
        node = self._node[block] if block < len(self._node) else None
        if node is None:
            return False
        self.version += 1
        if block in self._spares:
            self._promote(block)
            return True
        index = self._depth[block] - node.start
        self._disown(block)
        node.blocks[index] = HOLE
        self._epoch += 1
        self._settle(node)
        return True

    def below(self, block: int) -> list[int]:
        """Return what is cached below a block, and the block's duplicates.

        O(what is returned). Spares are listed with the block they stand by.
        """
        there = self._spare_of.get(block, block)
        node = self._node[there] if 0 <= there < len(self._node) else None
        if node is None:
            return []
        found = [there, *node.blocks[self._depth[there] - node.start + 1 :]]
        stack = list(node.children)
        while stack:
            child = stack.pop()
            found += child.blocks
            stack += child.children
        spares = [spare for b in found for spare in self._spares.get(b, ())]
        return [b for b in (*found, *spares) if b not in (HOLE, block)]

    def reset(self) -> None:
        """Forget everything."""
        version = self.version
        for node in self._nodes():
            node.alive = False
        for root in self._roots.values():
            root.alive = False
        self._forget()
        self.version = version + 1

    # -- looking ---------------------------------------------------------------

    def __contains__(self, block: object) -> bool:
        if not isinstance(block, int) or block < 0:
            return False
        if block in self._spare_of:
            return True
        return block < len(self._node) and self._node[block] is not None

    def is_idle(self, block: int) -> bool:
        """Whether a block is cached and nobody uses it, O(1)."""
        return 0 <= block < len(self._rank) and self._rank[block] != HELD

    def stats(self) -> Stats:
        """Return the sizes, O(1)."""
        return Stats(
            namespaces=len(self._roots),
            nodes=self._num_nodes,
            cached_blocks=self._num_cached,
            idle_blocks=self._num_idle,
            spare_blocks=len(self._spare_of),
        )

    def _nodes(self) -> Iterator[Node]:
        """Yield every node but the roots, parents first."""
        stack = [node for root in self._roots.values() for node in root.children[::-1]]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children[::-1])

    def dump(self, tokens: int = 6) -> str:
        """Return the tree as text: a line a node, children indented.

        Args:
            tokens: how many tokens of each edge to show.

        >>> from vllm_radix.tree import encode
        >>> tree = RadixTree(block_size=2)
        >>> _ = tree.insert(encode([1, 2, 3, 4]), [0, 1])
        >>> _ = tree.insert(encode([1, 2, 5, 6]), [0, 2], start=1)
        >>> print(tree.dump())
        namespace None
          [1 2] blocks 0, held
            [3 4] blocks 1, held
            [5 6] blocks 2, held
        """
        lines = []
        for namespace, root in self._roots.items():
            lines.append(f"namespace {namespace!r}")
            stack = [(node, 1) for node in root.children[::-1]]
            while stack:
                node, level = stack.pop()
                lines.append("  " * level + self._describe(node, tokens))
                stack.extend((child, level + 1) for child in node.children[::-1])
        return "\n".join(lines) or "empty"

    def _describe(self, node: Node, tokens: int) -> str:
        shown = decode(node.key[: 4 * tokens])
        more = " ..." if len(node.blocks) * self.block_size > tokens else ""
        edge = " ".join(str(token) for token in shown) + more
        blocks = ",".join("-" if b == HOLE else str(b) for b in node.blocks[:8])
        if len(node.blocks) > 8:
            blocks += f",... {len(node.blocks)} in all"
        idle = sum(self.is_idle(block) for block in node.blocks)
        state = f"{idle} idle" if idle else "held"
        return f"[{edge}] blocks {blocks}, {state}"

    def check(self) -> None:
        """Verify every invariant, O(everything); dump the tree on failure."""
        from vllm_radix.tree.invariants import check_tree

        try:
            check_tree(self)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.dump()}") from error
