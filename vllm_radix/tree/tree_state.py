"""The state of a radix tree, and the steps that keep its parts in agreement."""

from vllm_radix.tree.block_table import HELD, BlockTable
from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.class_evictor import ClassEvictor
from vllm_radix.tree.eviction import LRU, EvictionPolicy
from vllm_radix.tree.eviction_history import EvictionHistory
from vllm_radix.tree.evictor import Evictor
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.partial_blocks import subsumed_partial
from vllm_radix.tree.prefix_cache import PrefixCache, Stats
from vllm_radix.tree.shape import Shape
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN


class TreeState(PrefixCache):
    """What ``RadixTree`` builds its operations from; not public.

    Three parts: the ``Shape`` (nodes), the ``BlockTable`` (where each block is) and
    the ``Evictor`` (which idle block goes first).

    Args:
        block_size: tokens in a block.
        policy: says which idle blocks are evicted first. A policy serves one tree.

    Attributes:
        tells_all: ``changes`` has whatever may change a look-up's answer.
        following_bytes: of the tokens behind an edge in ``changes``: a block's.
    """

    tells_all = True

    def __init__(self, block_size: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__(block_size)
        self.following_bytes = self.block_bytes
        self.policy = policy or LRU()
        self.history: EvictionHistory | None = None
        self.changes: ChangeLog | None = None
        self._start_empty()

    def _start_empty(self) -> None:
        before: Evictor | None = getattr(self, "_evictor", None)
        self._table = BlockTable()
        self._shape = Shape(self.block_bytes, self._table)
        self._evictor = (
            Evictor(self._table)
            if self.policy.num_classes == 1
            else ClassEvictor(self.policy, self._table, self._shape)
        )
        if before is not None:
            self._evictor.on_unkept = before.on_unkept
            self._evictor.on_kept_moved = before.on_kept_moved

    def __contains__(self, block: object) -> bool:
        return block in self._table

    def is_idle(self, block: int) -> bool:
        """Whether a block is cached and no request uses it, O(1)."""
        ranks = self._table.ranks
        return 0 <= block < len(ranks) and ranks[block] != HELD

    def partial_tokens(self, block: int) -> int:
        """Return how many tokens a partial block holds; 0 for all others. O(1)."""
        node = self._table.node_of(block)
        if node is None or not node.partial:
            return 0
        return len(node.key) // BYTES_PER_TOKEN

    def pinned_blocks(self) -> set[int]:
        """Return the pinned blocks: O(n)."""
        return set(self._evictor.pins)

    @property
    def num_cached(self) -> int:
        """Number of blocks in which a prefix can be found."""
        return self._table.num_cached

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self._shape.num_nodes

    @property
    def num_idle(self) -> int:
        """Number of blocks that are cached and that no request uses."""
        return self._evictor.num_idle

    @property
    def num_unhit(self) -> int:
        """Number of idle partial blocks that were never hit."""
        return self._evictor.num_unhit

    @property
    def num_pinned_idle(self) -> int:
        """Number of idle blocks that are pinned, or lie before a pinned one."""
        return self._evictor.num_pinned_idle

    @property
    def learns(self) -> bool:
        """Whether the policy wants to know of uses: ``note_use``, ``note_end``."""
        return isinstance(self._evictor, ClassEvictor)

    @property
    def num_remembered(self) -> int:
        """Number of evicted blocks that the policy will know again."""
        evictor = self._evictor
        return (
            evictor.account.num_remembered if isinstance(evictor, ClassEvictor) else 0
        )

    @property
    def visited(self) -> int:
        """Number of nodes that operations have looked at, for tests of cost."""
        return self._shape.visited + self._evictor.looks

    def stats(self) -> Stats:
        """Return the sizes, O(1)."""
        return Stats(
            namespaces=len(self._shape.roots),
            nodes=self._shape.num_nodes,
            cached_blocks=self._table.num_cached,
            idle_blocks=self._evictor.num_idle,
            duplicate_blocks=len(self._table.duplicate_of),
            partial_blocks=self._shape.num_partial,
            unhit_blocks=self._evictor.num_unhit,
        )

    # -- steps of several operations -------------------------------------------

    def _refuse_known(self, ids: list[int]) -> None:
        """Refuse ids that cannot be inserted, O(1) each."""
        nodes, duplicate_of = self._table.nodes, self._table.duplicate_of
        known = len(nodes)
        for block in ids:
            if block < 0 or block in duplicate_of or (block < known and nodes[block]):
                self._refuse(block)

    def _place(self, node: Node, index: int, block: int, uncached: list[int]) -> None:
        """Put a held block where the path already is."""
        table = self._table
        there = node.blocks[index]
        if there == HOLE:
            node.holes -= 1
            if self.changes is not None:
                self.changes.rescan_all = True
        elif table.ranks[there] == HELD:
            table.add_duplicate(block, there)
            return
        else:
            self._replace(there, block, node, index)
            uncached.append(there)
            return
        node.blocks[index] = block
        table.assign_owner(block, node, node.start + index)

    def _replace(self, block: int, other: int, node: Node, index: int) -> None:
        """Put a held block in the place of another, which leaves; keep it as that."""
        kept = self._evictor.kept.pop(block, None)
        self._clear_owner(block)
        node.blocks[index] = other
        self._table.assign_owner(other, node, node.start + index)
        if kept is not None:
            self._evictor.kept[other] = kept
            if self._evictor.on_kept_moved is not None:
                self._evictor.on_kept_moved(block, other)

    def _drop_subsumed_partial(
        self, node: Node, tokens: bytes, uncached: list[int]
    ) -> None:
        """Remove the neighbouring idle partial block that ``tokens`` continue."""
        child = subsumed_partial(node, tokens)
        if child is not None and self._table.ranks[child.blocks[0]] != HELD:
            (block,) = child.blocks
            self._clear_owner(block)
            self._shape.unlink(child)
            uncached.append(block)

    def _clear_owner(self, block: int) -> None:
        """Take a block out of its node, which still lists it."""
        self._evictor.forget(block)
        self._table.clear_owner(block)
        if self.history is not None:
            self.history.forget(block)
        if self.changes is not None:
            self.changes.removed_blocks.append(block)

    def _remove_partial(self, node: Node) -> None:
        """Take a partial block out of the tree."""
        self._clear_owner(node.blocks[0])
        self._settle(self._shape.unlink(node))

    def _replace_by_duplicate(self, block: int) -> None:
        """Put the first duplicate of a block in its place."""
        table = self._table
        node, depth = table.nodes[block], table.depths[block]
        assert node is not None
        self._replace(block, table.next_duplicate(block), node, depth - node.start)

    def _settle(self, node: Node) -> None:
        """Put a node that lost blocks or children in order, and those above it."""
        leaf = self._shape.settle(node)
        if leaf is not None:
            self._evictor.offer_end(leaf)

    def _remember_end(self, leaf: Node, history: EvictionHistory) -> None:
        """Note in ``history`` where the end of a leaf was evicted."""
        size, left = self.block_bytes, len(leaf.blocks)
        first = bytes(leaf.key[left * size : (left + 1) * size])
        if len(first) < size:
            return  # a partial block: no request ever missed it as a whole
        above = leaf if left else leaf.parent
        assert above is not None
        if not above.blocks:
            history.note(ChangeLog.root(self._shape.namespace_of[above]), first)
        elif above.blocks[-1] != HOLE:
            history.note(above.blocks[-1], first)
