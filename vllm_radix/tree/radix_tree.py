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

from collections.abc import Iterable, Mapping, Sequence

from vllm_radix.tree.block_table import HELD
from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.class_evictor import ClassEvictor
from vllm_radix.tree.debug.check import check_tree
from vllm_radix.tree.debug.dump import dump
from vllm_radix.tree.debug.miss import Miss, explain
from vllm_radix.tree.eviction_history import EvictionHistory
from vllm_radix.tree.evictor import PIN, UNHIT
from vllm_radix.tree.hinted_tree import HintedTree
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.partial_blocks import (
    find_partial,
    has_block_starting_with,
)
from vllm_radix.tree.prefix_cache import ALL_WRITTEN, Match, Namespace
from vllm_radix.tree.probe import Probe, probe
from vllm_radix.tree.reuse import Use
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN


class RadixTree(HintedTree):
    """A prefix cache as a radix tree; see ``PrefixCache`` for its rules.

    Args:
        block_size: tokens in a block.
        policy: says which idle blocks are evicted first. A policy serves one tree.

    Attributes:
        history: set it to an ``EvictionHistory`` to learn from ``explain`` what was
            evicted; None, as at first, keeps nothing.
        changes: set it to a ``ChangeLog`` to learn what has changed; None, as at
            first, notes nothing.

    >>> from vllm_radix.tree import encode
    >>> tree = RadixTree(block_size=2)
    >>> tree.insert(encode([1, 2, 3, 4]), [10, 11])
    []
    >>> tree.match(encode([1, 2, 9, 9])).blocks
    (10,)
    >>> tree.match(encode([1, 2, 3, 9]), partial=True)
    Match(blocks=(10,), partial=PartialMatch(block=11, num_tokens=1, num_valid=2))
    >>> tree.release([11, 10])  # the request is done; its tail goes first
    []
    >>> tree.evict(1)
    [11]
    """

    # -- looking up ------------------------------------------------------------

    def match(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        *,
        partial: bool = False,
        written: Mapping[int, int] = ALL_WRITTEN,
    ) -> Match:
        """Return the longest cached prefix: O(L in memcmp + d log fan-out).

        A partial match costs one more search, and a look at the blocks of
        ``written`` beside it, 64 on each side at most.
        """
        tokens = len(key) // BYTES_PER_TOKEN
        if limit is not None and limit < tokens:
            tokens = limit
        wanted = tokens // self.block_size
        shape = self._shape
        node = shape.roots.get(namespace)
        if node is None:
            return Match(())
        found: list[int] = []
        depth = 0
        while depth < wanted:
            shape.visited += 1
            child = shape.child(node, key, depth)
            if child is None or child.blocks[0] == HOLE:
                break
            node = child
            length = shape.shared_blocks(node, 0, key, depth, wanted)
            run = node.blocks if length == len(node.blocks) else node.blocks[:length]
            if node.holes and HOLE in run:
                run = run[: run.index(HOLE)]
            found += run
            depth += len(run)
            if len(run) < len(node.blocks):
                break
        if partial and depth * self.block_size < tokens:
            size = self.block_bytes
            rest = key[depth * size : tokens * BYTES_PER_TOKEN][:size]
            at = depth - node.start
            best, looked = find_partial(node, at, rest, size, written)
            shape.visited += looked
            return Match(tuple(found), best)
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
            wanted = min(wanted, limit // self.block_size)
        return probe(self._shape, key, namespace, wanted, last)

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
        size, table, shape = self.block_bytes, self._table, self._shape
        ids = list(blocks[start:])
        known = table.partial_node(ids[0], start)
        if known is not None:
            self._refuse_other(known.key, key[start * size :], ids[0])
        self._refuse_known(ids[known is not None :])
        table.grow(max(ids) + 1)
        self.version += 1
        uncached: list[int] = []
        if known is not None:
            self._remove_partial(known)

        node, depth = table.node_before(blocks, start), start
        if node is None:
            node, depth = shape.root(namespace), 0
        while depth < total:
            inside = depth - node.start
            if inside < len(node.blocks):
                shared = shape.shared_blocks(node, inside, key, depth, total)
                for index in range(inside, inside + shared):
                    offset = node.start + index - start
                    if offset >= 0:
                        self._place(node, index, ids[offset], uncached)
                depth += shared
                if depth < total and inside + shared < len(node.blocks):
                    node = shape.split(node, inside + shared)
                continue
            shape.visited += 1
            below = shape.child(node, key, depth)
            if below is not None:
                node = below
                continue
            tokens = key[depth * size : total * size]
            if depth < start:
                new = [HOLE] * (start - depth) + ids
            else:
                self._drop_subsumed_partial(node, tokens[:size], uncached)
                new = ids[depth - start :]
                if self.changes is not None:
                    end = node.blocks[-1] if depth else ChangeLog.root(namespace)
                    self.changes.added_edges.append((end, bytes(tokens[:size])))
            if node.parent is not None and not node.children:
                shape.extend(node, tokens, new)
            else:
                node = shape.link(node, tokens, new, depth)
            node.holes += max(0, start - depth)
            table.assign_owners(ids[max(0, depth - start) :], node, max(depth, start))
            depth = total
        return uncached

    def insert_partial(
        self, key: bytes, blocks: Sequence[int], namespace: Namespace = None
    ) -> tuple[bool, list[int]]:
        """Cache a partial block: O(1) steps, and a split of O(its start)."""
        self._refuse_partial(key, len(blocks))
        table, shape = self._table, self._shape
        block, depth = blocks[-1], len(blocks) - 1
        tokens = key[depth * self.block_bytes :]
        known = table.partial_node(block, depth)
        if known is None:
            self._refuse(block)
        else:
            self._refuse_other(known.key, tokens, block)
            if known.key == tokens:
                return True, []
            self._remove_partial(known)
            self.version += 1
        node: Node | None
        if depth == 0:
            node = shape.root(namespace)
        else:
            node = table.node_before(blocks, depth)
            if node is None:
                node = shape.path_end(key, namespace, depth)
            if node is None or node.blocks[depth - 1 - node.start] == HOLE:
                return False, []
        inside = depth - node.start
        if has_block_starting_with(node, inside, tokens, self.block_bytes):
            return False, []
        table.grow(block + 1)
        self.version += 1
        uncached: list[int] = []
        if inside < len(node.blocks):
            node = shape.split(node, inside)
        else:
            shape.prepare_to_grow(node)
            self._drop_subsumed_partial(node, tokens, uncached)
        child = shape.link(node, tokens, [block], depth)
        child.hit = known is not None and known.hit
        table.assign_owner(block, child, depth)
        return True, uncached

    def note_hit(self, block: int) -> None:
        """Note that a request copies from a block, O(1)."""
        node = self._table.node_of(block)
        if node is not None:
            node.hit = True

    # -- uses, for policies that learn -----------------------------------------

    def note_use(
        self, key: bytes, namespace: Namespace, last: int, found: int
    ) -> Use | None:
        """Note that a request was admitted: O(runs of its path).

        Args:
            key: of its prompt.
            namespace: of its blocks.
            last: the last cached block of its prefix; any number if there is none.
            found: blocks of that prefix.

        Returns:
            What to hand to ``note_end``; None if the policy does not ask for it.
        """
        if not isinstance(self._evictor, ClassEvictor):
            return None
        return self._evictor.account.admit(key, namespace, last, found)

    def note_end(
        self,
        blocks: Sequence[int],
        use: Use | None,
        output_tokens: int,
        new_tokens: int,
    ) -> None:
        """Note that a request ends, before its blocks are released.

        O(runs of its path). Without it, blocks count as those of a request that has
        used them once and that said nothing.

        Args:
            blocks: all its blocks, in order.
            use: what ``note_use`` said; None if it was not called.
            output_tokens: that it has generated.
            new_tokens: of its prompt that nobody had asked for; see ``Use.seen``.
        """
        if isinstance(self._evictor, ClassEvictor):
            self._evictor.account.end(blocks, use, output_tokens, new_tokens)

    # -- holding and letting go ------------------------------------------------

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held, O(1) each."""
        ranks = self._table.ranks
        for block in blocks:
            if block < len(ranks) and ranks[block] != HELD:
                self._evictor.hold(block)

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle, O(1) each and O(log n) per leaf."""
        uncached: list[int] = []
        table, evictor = self._table, self._evictor
        nodes, ranks, depths = table.nodes, table.ranks, table.depths
        duplicates, duplicate_of = table.duplicates, table.duplicate_of
        pins, kept, clock = evictor.pins, evictor.kept, evictor.clock
        known, pinned = len(nodes), 0
        for block in blocks:
            if block in duplicate_of:
                table.drop_duplicate(block)
                uncached.append(block)
                continue
            node = nodes[block] if block < known else None
            if node is None or ranks[block] != HELD:
                continue
            if block in duplicates:
                self._replace_by_duplicate(block)
                uncached.append(block)
                continue
            ranks[block] = clock
            clock += 1
            if kept and block in kept:
                ranks[block] += kept[block]
            if depths[block] < node.pinned_to:
                pinned += 1
                if block in pins:
                    ranks[block] += PIN
            if node.blocks[-1] == block and not node.children:
                if node.partial and not node.hit:
                    ranks[block] += UNHIT
                    evictor.num_unhit += 1
                evictor.offer(block)
        evictor.num_idle += clock - evictor.clock
        evictor.num_pinned_idle += pinned
        evictor.clock = clock
        return uncached

    def pin(self, block: int) -> None:
        """Evict a block last, and so the blocks before it on its path.

        O(1) for a block that is pinned already; else O(nodes above it whose blocks
        were not pinned, and their blocks).
        """
        self._evictor.pin(block)

    def unpin(self, block: int) -> None:
        """Take back one ``pin`` of a block; O as for ``pin``."""
        self._evictor.unpin(block)

    def evict(self, count: int) -> list[int]:
        """Evict, O(log n) per run of blocks and O(1) per block of it.

        A node left with one child is joined with it: O(blocks of the child).
        """
        out: list[int] = []
        evictor, history, changes = self._evictor, self.history, self.changes
        while len(out) < count:
            before = len(out)
            leaf = evictor.pop_run(count - before, out)
            if leaf is None:
                break
            if changes is not None:
                changes.removed_blocks += out[before:]
            if history is not None:
                for block in out[before:]:
                    history.forget(block)
                self._remember_end(leaf, history)
            self._settle(leaf)
        if out:
            self.version += 1
        return out

    def discard(self, block: int) -> bool:
        """Let go of one block, leaving a hole if need be: O(edge)."""
        table = self._table
        if block in table.duplicate_of:
            table.drop_duplicate(block)
            return True
        node = table.nodes[block] if block < len(table.nodes) else None
        if node is None:
            return False
        self.version += 1
        if block in table.duplicates:
            self._replace_by_duplicate(block)
            return True
        if node.partial:
            self._remove_partial(node)
            return True
        # Unpinned while it is of its class still: that puts it back into it.
        self._evictor.forget(block)
        self._evictor.drop(node, table.depths[block])
        self._clear_owner(block)
        node.blocks[table.depths[block] - node.start] = HOLE
        node.holes += 1
        self._shape.epoch += 1
        if self.changes is not None:
            self.changes.rescan_all = True
        self._settle(node)
        return True

    def reset(self) -> None:
        """Forget everything."""
        for node in (*self._shape.nodes(), *self._shape.roots.values()):
            node.alive = False
        self._start_empty()
        self.policy.forget()
        if self.history is not None:
            self.history.clear()
        if self.changes is not None:
            self.changes.rescan_all = True
        self.version += 1

    # -- reading ---------------------------------------------------------------

    def below(self, block: int) -> list[int]:
        """Return what is cached below a block, and the block's duplicates.

        O(what is returned). Duplicates are listed with the block they stand by.
        """
        table = self._table
        there = table.duplicate_of.get(block, block)
        node = table.node_of(there)
        if node is None:
            return []
        found = [there, *node.blocks[table.depths[there] - node.start + 1 :]]
        stack = list(node.children)
        while stack:
            child = stack.pop()
            found += child.blocks
            stack += child.children
        others = [other for b in found for other in table.duplicates.get(b, ())]
        return [b for b in (*found, *others) if b not in (HOLE, block)]

    def idle_on_path(
        self, block: int, taken: dict[Node, int], take: bool = False
    ) -> int:
        """Return the idle blocks among a cached block and those before it.

        A request that uses a prefix holds all of it, so the idle ones are the last
        ones: O(nodes that hold them, log of their blocks).

        Args:
            block: where the path ends.
            taken: what is to count as held: the depth up to which, for each edge.
            take: add the path to ``taken``.
        """
        return self._evictor.idle_on_path(block, taken, take)

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
        return dump(self._shape, self._table, self.block_size, tokens)

    def remember_evictions(self) -> EvictionHistory:
        """Return a ``history``, kept from now on, for ``explain``."""
        self.history = EvictionHistory()
        return self.history

    def explain(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
    ) -> Miss:
        """Return why the cached prefix of a key ends where it does.

        As ``match``, and O(log fan-out) in each of up to 64 other namespaces.
        """
        return explain(self, self._shape, self.history, key, namespace, limit)

    def check(self) -> None:
        """Verify every invariant, O(everything); dump the tree on failure."""
        try:
            check_tree(self._shape, self._table, self._evictor)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.dump()}") from error
