"""A path-compressed radix tree of token blocks.

Each node is an edge: a run of whole blocks that no other path shares in part::

    root --[sys0 sys1]--+--[userA0 userA1 userA2]--(us
                        +--[userB0]--+--[...]
                                     +--[...]

``key`` holds the run's tokens and ``blocks`` its block ids, so that a match
costs one memcmp per node. Children are sorted by their first block, which
siblings never share; a partial block, ``(us`` above, is a leaf among them with a
shorter key. Neighbours in that order have the longest tokens in common, so a hit
inside a block is found next to where the key would be inserted. The structure is
that of RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured
Language Model Programs", 2024), with whole blocks as letters, eviction block by
block, and duplicates.

Costs below: L bytes compared, d nodes on the path, n nodes in the tree.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop

from vllm_radix.tree.base import Namespace, Stats
from vllm_radix.tree.dump import dump
from vllm_radix.tree.explain import Miss, explain
from vllm_radix.tree.keys import BYTES_PER_TOKEN
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.reading import Reading
from vllm_radix.tree.structure import HELD, PIN, TAIL


class RadixTree(Reading):
    """A prefix cache as a radix tree; see ``PrefixCache`` for its rules.

    Args:
        block_size: tokens in a block.
        policy: ranks idle blocks for eviction.

    Attributes:
        visited: nodes that operations have looked at, for tests of cost.
        history: set it to a ``History`` to learn from ``explain`` what was evicted.

    >>> from vllm_radix.tree import encode
    >>> tree = RadixTree(block_size=2)
    >>> tree.insert(encode([1, 2, 3, 4]), [10, 11])
    []
    >>> tree.match(encode([1, 2, 9, 9])).blocks
    (10,)
    >>> tree.match(encode([1, 2, 3, 9]), partial=True)
    Match(blocks=(10,), partial=Partial(block=11, num_tokens=1, num_valid=2))
    >>> tree.release([11, 10])  # the request is done; its tail goes first
    []
    >>> tree.evict(1)
    [11]
    """

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
        total = len(blocks)
        self._refuse_key(key, total)
        if start >= total:
            return []
        size = self.block_bytes
        ids = list(blocks[start:])
        known = self._partial_at(ids[0], start)
        if known is not None:
            self._refuse_other(known.key, key[start * size :], ids[0])
        self._refuse_all(ids[known is not None :])
        self._grow(max(ids) + 1)
        self.version += 1
        freed: list[int] = []
        if known is not None:
            self._unfile(known)

        node, depth = self._node_before(blocks, start), start
        if node is None:
            node, depth = self._root(namespace), 0
        while depth < total:
            inside = depth - node.start
            if inside < len(node.blocks):
                shared = self._shared(node, inside, key, depth, total)
                for index in range(inside, inside + shared):
                    offset = node.start + index - start
                    if offset >= 0:
                        self._place(node, index, ids[offset], freed)
                depth += shared
                if depth < total and inside + shared < len(node.blocks):
                    node = self._split(node, inside + shared)
                continue
            self.visited += 1
            below = self._child(node, key, depth)
            if below is not None:
                node = below
                continue
            tokens = key[depth * size : total * size]
            if depth < start:
                new = [HOLE] * (start - depth) + ids
            else:
                self._outdate(node, tokens[:size], freed)
                new = ids[depth - start :]
                if self.news is not None:
                    end = node.blocks[-1] if depth else self.news.root(namespace)
                    self.news.grown.append((end, bytes(tokens[:size])))
            if node.parent is not None and not node.children:
                self._regrow(node)
                if isinstance(node.key, bytes):
                    node.key = bytearray(node.key)
                node.key += tokens
                node.blocks += new
            else:
                node = self._link(node, tokens, new, depth)
            node.holes += max(0, start - depth)
            self._own_all(ids[max(0, depth - start) :], node, max(depth, start))
            depth = total
        return freed

    def insert_partial(
        self, key: bytes, blocks: Sequence[int], namespace: Namespace = None
    ) -> tuple[bool, list[int]]:
        """Cache a partial block: O(1) steps, and a split of O(its start)."""
        self._refuse_partial(key, len(blocks))
        block, depth = blocks[-1], len(blocks) - 1
        tokens = key[depth * self.block_bytes :]
        known = self._partial_at(block, depth)
        if known is None:
            self._refuse(block)
        else:
            self._refuse_other(known.key, tokens, block)
            if known.key == tokens:
                return True, []
            self._unfile(known)
            self.version += 1
        node: Node | None
        if depth == 0:
            node = self._root(namespace)
        else:
            node = self._node_before(blocks, depth)
            if node is None:
                node = self._path_end(key, namespace, depth)
            if node is None or node.blocks[depth - 1 - node.start] == HOLE:
                return False, []
        if self._inside_says(node, depth, tokens):
            return False, []
        self._grow(block + 1)
        self.version += 1
        freed: list[int] = []
        if depth < node.start + len(node.blocks):
            node = self._split(node, depth - node.start)
        else:
            self._regrow(node)
            self._outdate(node, tokens, freed)
        child = self._link(node, tokens, [block], depth)
        child.hit = known is not None and known.hit
        self._own(block, child, depth)
        return True, freed

    def note_hit(self, block: int) -> None:
        """Note that somebody copies from a block, O(1)."""
        node = self._node_of(block)
        if node is not None:
            node.hit = True

    def _refuse_all(self, ids: list[int]) -> None:
        nodes, spares = self._node, self._spare_of
        known = len(nodes)
        for block in ids:
            if block < 0 or block in spares or (block < known and nodes[block]):
                self._refuse(block)

    def _inside_says(self, node: Node, depth: int, tokens: bytes) -> bool:
        """Whether some block at ``depth`` starts with all of ``tokens``."""
        size = self.block_bytes
        at = depth - node.start
        if at < len(node.blocks):
            here = node.key[at * size : (at + 1) * size]
            return node.blocks[at] != HOLE and here.startswith(tokens)
        for i in range(bisect_left(node.first, tokens), len(node.first)):
            if not node.first[i].startswith(tokens):
                break
            if node.children[i].blocks[0] != HOLE:
                return True
        return False

    def _outdate(self, node: Node, tokens: bytes, freed: list[int]) -> None:
        """Drop the idle partial block next to ``tokens`` if they say it all."""
        at = bisect_left(node.first, tokens) - 1
        if at < 0:
            return
        child = node.children[at]
        if self._is_partial(child) and tokens.startswith(child.key):
            (block,) = child.blocks
            if self._rank[block] != HELD:
                self._disown(block)
                self._unlink(child)
                freed.append(block)

    def _place(self, node: Node, index: int, block: int, freed: list[int]) -> None:
        """Put a held block where the path already is."""
        there = node.blocks[index]
        if there == HOLE:
            node.holes -= 1
            if self.news is not None:
                self.news.reshaped = True
        elif self._rank[there] == HELD:
            self._spares.setdefault(there, []).append(block)
            self._spare_of[block] = there
            return
        else:
            self._disown(there)
            freed.append(there)
        node.blocks[index] = block
        self._own(block, node, node.start + index)

    # -- holding and letting go ------------------------------------------------

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held, O(1) each."""
        for block in blocks:
            if block < len(self._rank) and self._rank[block] != HELD:
                self._hold(block)

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle, O(1) each and O(log n) per leaf."""
        freed: list[int] = []
        nodes, ranks, depths = self._node, self._rank, self._depth
        spares, spare_of, pins = self._spares, self._spare_of, self._pins
        rank, clock, known = self.policy.rank, self._clock, len(self._node)
        pinned = 0
        for block in blocks:
            if block in spare_of:
                self._drop_spare(block)
                freed.append(block)
                continue
            node = nodes[block] if block < known else None
            if node is None or ranks[block] != HELD:
                continue
            if block in spares:
                self._promote(block)
                freed.append(block)
                continue
            ranks[block] = rank(clock, depths[block])
            clock += 1
            if depths[block] < node.pinned_to:
                pinned += 1
                if block in pins:
                    ranks[block] += PIN
            if node.blocks[-1] == block and not node.children:
                if len(node.key) < self.block_bytes and not node.hit:
                    ranks[block] += TAIL
                    self._num_tails += 1
                self._offer(block)
        self._num_idle += clock - self._clock
        self._num_pinned_idle += pinned
        self._clock = clock
        return freed

    def evict(self, count: int) -> list[int]:
        """Evict, O(log n) per run of blocks and O(1) per block of it.

        A node left with one child is joined with it: O(blocks of the child).
        """
        out: list[int] = []
        while self._heap and len(out) < count:
            rank, block = heappop(self._heap)
            self.visited += 1
            if not self._is_current(rank, block):
                continue
            node = self._node[block]
            assert node is not None
            # One edge's tail at a time, while it stays the lowest rank.
            following = self._heap[0][0] if self._heap else None
            run, before = node.blocks, len(out)
            end = node.start + len(run)
            while True:
                self._num_tails -= rank < HELD
                if rank >= PIN:
                    del self._pins[block]
                self._node[block] = None
                self._rank[block] = HELD
                out.append(block)
                run.pop()
                if not run or len(out) >= count:
                    break
                block = run[-1]
                if block == HOLE:
                    break
                rank = self._rank[block]
                if rank == HELD or (following is not None and rank > following):
                    break
            self._num_cached -= len(out) - before
            self._num_idle -= len(out) - before
            left = node.start + len(run)
            if node.pinned_to > left:
                self._num_pinned_idle -= min(node.pinned_to, end) - left
                self._shrink_pinned(node)
            if self.history is not None:
                for block in out[before:]:
                    self.history.forget(block)
            if self.news is not None:
                self.news.gone += out[before:]
            node.trimmed = True
            if self.history is not None:
                self._remember(node)
            self._settle(node)
        if out:
            self.version += 1
        return out

    def _remember(self, node: Node) -> None:
        """Note for ``history`` where the tail of a leaf was evicted."""
        assert self.history is not None
        size, left = self.block_bytes, len(node.blocks)
        first = bytes(node.key[left * size : (left + 1) * size])
        if len(first) < size:
            return  # a partial block: no request ever missed it as a whole
        above = node if left else node.parent
        assert above is not None
        if not above.blocks:
            self.history.note(("root", self._namespace_of[above]), first)
        elif above.blocks[-1] != HOLE:
            self.history.note(above.blocks[-1], first)

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
        if self._is_partial(node):
            self._unfile(node)
            return True
        self._disown(block)
        node.blocks[self._depth[block] - node.start] = HOLE
        node.holes += 1
        self._epoch += 1
        if self.news is not None:
            self.news.reshaped = True
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

    def partial_tokens(self, block: int) -> int:
        """Return how many tokens a partial block holds; 0 for all others. O(1)."""
        node = self._node_of(block)
        if node is None or not self._is_partial(node):
            return 0
        return len(node.key) // BYTES_PER_TOKEN

    @property
    def num_idle(self) -> int:
        """How many blocks are cached and used by nobody."""
        return self._num_idle

    @property
    def num_tails(self) -> int:
        """How many idle blocks are partial ones that nobody has hit."""
        return self._num_tails

    def stats(self) -> Stats:
        """Return the sizes, O(1)."""
        return Stats(
            namespaces=len(self._roots),
            nodes=self._num_nodes,
            cached_blocks=self._num_cached,
            idle_blocks=self._num_idle,
            spare_blocks=len(self._spare_of),
            partial_blocks=self._num_partial,
            tail_blocks=self._num_tails,
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
        return dump(self, tokens)

    def explain(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
    ) -> Miss:
        """Return why the cached prefix of a key ends where it does.

        As ``match``, and O(log fan-out) in each of up to 64 other namespaces.
        """
        return explain(self, key, namespace, limit)

    def check(self) -> None:
        """Verify every invariant, O(everything); dump the tree on failure."""
        from vllm_radix.tree.invariants import check_tree

        try:
            check_tree(self)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.dump()}") from error
