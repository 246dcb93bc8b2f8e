"""What must hold in a radix tree at all times, as code."""

from vllm_radix.tree.block_table import HELD, BlockTable
from vllm_radix.tree.evictor import DONE, KEEP, LEVEL, PIN, UNHIT, Evictor
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.shape import Shape


def check_tree(shape: Shape, table: BlockTable, evictor: Evictor) -> None:
    """Verify every invariant of a tree, O(everything).

    Raises:
        AssertionError: an invariant is broken.
    """
    size = shape.block_bytes
    seen: dict[int, tuple[Node, int]] = {}
    count = partial = 0
    offered = evictor.offered()
    for root in shape.roots.values():
        assert root.children, "an empty namespace was left behind"
        assert root.alive and root.parent is None and not root.blocks
    for node in [*shape.roots.values(), *shape.nodes()]:
        assert node.alive, "a removed node is in the tree"
        assert len(node.children) == len(node.child_keys)
        assert node.child_keys == sorted(set(node.child_keys)), "siblings share a block"
        end = node.start + len(node.blocks)
        for first, child in zip(node.child_keys, node.children, strict=True):
            assert child.parent is node, "a child does not know its parent"
            assert child.start == end, "an edge starts at the wrong depth"
            assert child.key[:size] == first, "a child is filed wrongly"
        if node.parent is None:
            continue
        count += 1
        assert node.blocks, "an edge without blocks"
        if node.partial:
            partial += 1
            assert len(node.blocks) == 1 and not node.children, "below a partial block"
        else:
            assert len(node.key) >= len(node.blocks) * size
            assert len(node.key) == len(node.blocks) * size or not node.children
        chain = len(node.children) == 1 and not node.children[0].partial
        assert not chain, "a chain is not compressed"
        assert node.blocks.count(HOLE) == node.holes, "holes are miscounted"
        for index, block in enumerate(node.blocks):
            if block == HOLE:
                continue
            assert block not in seen, f"block {block} is in two places"
            seen[block] = node, node.start + index
        if not node.children:
            tail = node.blocks[-1]
            assert tail != HOLE, "a leaf ends in a hole"
            if table.ranks[tail] != HELD:
                entry = table.ranks[tail], tail
                assert entry in offered, f"block {tail} can never be evicted"
    assert count == shape.num_nodes, "nodes are miscounted"
    assert partial == shape.num_partial, "partial blocks are miscounted"
    assert len(seen) == table.num_cached, "blocks are miscounted"
    for block, node_of in enumerate(table.nodes):
        place = (node_of, table.depths[block]) if node_of is not None else None
        assert seen.get(block) == place, f"block {block} is filed wrongly"
        assert place or table.ranks[block] == HELD, f"block {block} idle, blank"
    idle = sum(rank != HELD for rank in table.ranks)
    assert idle == evictor.num_idle, "idle blocks are miscounted"
    unhit = sum(rank < DONE for rank in table.ranks)
    assert unhit == evictor.num_unhit, "partial blocks never hit are miscounted"
    _check_pins(shape, table, evictor, seen)
    for there, duplicates in table.duplicates.items():
        assert there in seen and table.ranks[there] == HELD, "duplicates of no block"
        assert duplicates and all(table.duplicate_of[d] == there for d in duplicates)
    assert sum(map(len, table.duplicates.values())) == len(table.duplicate_of)
    assert not table.duplicate_of.keys() & seen.keys(), "a duplicate is in the tree"


def _check_pins(
    shape: Shape, table: BlockTable, evictor: Evictor, seen: dict[int, tuple[Node, int]]
) -> None:
    """Verify what is known of pinned blocks, and of those before them."""
    pinned_to = {node: node.start for node in shape.nodes()}
    for block in evictor.pins:
        assert block in seen, f"block {block} is pinned, and not cached"
        node, depth = seen[block]
        pinned_to[node] = max(pinned_to[node], depth + 1)
        while node.parent is not None and node.parent.parent is not None:
            pinned_to[node.parent] = node.start
            node = node.parent
    for node, end in pinned_to.items():
        assert node.pinned_to == end, "a path is pinned wrongly"
        assert node.shared_to >= node.start, "it is shared before it begins"
        below = sum(pinned_to[child] > child.start for child in node.children)
        assert node.pinned_children == below, "pinned children are miscounted"
    for block, rank in enumerate(table.ranks):
        pinned = block in evictor.pins and rank != HELD
        assert (rank >= PIN) == pinned, f"block {block} is ranked wrongly"
        kept = evictor.kept.get(block, 0)
        if rank != HELD:
            band = rank // LEVEL * LEVEL
            wanted = kept + PIN * pinned
            first = band == UNHIT or DONE <= band < 0
            assert band == wanted or (first and not wanted), "a rank is in no band"
    for block, offset in evictor.kept.items():
        assert block in seen and not seen[block][0].partial, "kept, and not cached"
        assert KEEP <= offset < PIN, "a block is kept in no level"
    count = sum(
        table.ranks[block] != HELD and depth < pinned_to[node]
        for block, (node, depth) in seen.items()
    )
    assert count == evictor.num_pinned_idle, "pinned idle blocks are miscounted"
