"""What must hold in a radix tree at all times, as code."""

from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.radix_tree import RadixTree
from vllm_radix.tree.structure import HELD, PIN


def check_tree(tree: RadixTree) -> None:
    """Verify every invariant of a tree, O(everything).

    Raises:
        AssertionError: an invariant is broken.
    """
    size = tree.block_bytes
    seen: dict[int, tuple[Node, int]] = {}
    count = partial = 0
    offered = {entry for entry in tree._heap if tree._is_current(*entry)}
    for root in tree._roots.values():
        assert root.children, "an empty namespace was left behind"
        assert root.alive and root.parent is None and not root.blocks
    for node in [*tree._roots.values(), *tree._nodes()]:
        assert node.alive, "a removed node is in the tree"
        assert len(node.children) == len(node.first)
        assert node.first == sorted(set(node.first)), "siblings share a block"
        end = node.start + len(node.blocks)
        for first, child in zip(node.first, node.children, strict=True):
            assert child.parent is node, "a child does not know its parent"
            assert child.start == end, "an edge starts at the wrong depth"
            assert child.key[:size] == first, "a child is filed wrongly"
        if node.parent is None:
            continue
        count += 1
        assert node.blocks, "an edge without blocks"
        if tree._is_partial(node):
            partial += 1
            assert len(node.blocks) == 1 and not node.children, "below a partial block"
        else:
            assert len(node.key) >= len(node.blocks) * size
            assert len(node.key) == len(node.blocks) * size or not node.children
        chain = len(node.children) == 1 and not tree._is_partial(node.children[0])
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
            if tree.is_idle(tail):
                entry = tree._rank[tail], tail
                assert entry in offered, f"block {tail} can never be evicted"
    assert count == tree._num_nodes, "nodes are miscounted"
    assert partial == tree._num_partial, "partial blocks are miscounted"
    assert len(seen) == tree._num_cached, "blocks are miscounted"
    for block, node_of in enumerate(tree._node):
        place = (node_of, tree._depth[block]) if node_of is not None else None
        assert seen.get(block) == place, f"block {block} is filed wrongly"
        assert place or tree._rank[block] == HELD, f"block {block} idle, blank"
    idle = sum(rank != HELD for rank in tree._rank)
    assert idle == tree._num_idle, "idle blocks are miscounted"
    tails = sum(rank < HELD for rank in tree._rank)
    assert tails == tree._num_tails, "tails are miscounted"
    _check_pins(tree, seen)
    for there, spares in tree._spares.items():
        assert there in seen and not tree.is_idle(there), "spares of no block"
        assert spares and all(tree._spare_of[s] == there for s in spares)
    assert sum(map(len, tree._spares.values())) == len(tree._spare_of)
    assert not tree._spare_of.keys() & seen.keys(), "a spare is in the tree"


def _check_pins(tree: RadixTree, seen: dict[int, tuple[Node, int]]) -> None:
    """Verify what is known of pinned blocks, and of those before them."""
    pinned_to = {node: node.start for node in tree._nodes()}
    for block in tree._pins:
        assert block in seen, f"block {block} is pinned, and not cached"
        node, depth = seen[block]
        pinned_to[node] = max(pinned_to[node], depth + 1)
        while node.parent is not None and node.parent.parent is not None:
            pinned_to[node.parent] = node.start
            node = node.parent
    for node, end in pinned_to.items():
        assert node.pinned_to == end, "a path is pinned wrongly"
        below = sum(pinned_to[child] > child.start for child in node.children)
        assert node.pinned_children == below, "pinned children are miscounted"
    for block, rank in enumerate(tree._rank):
        pinned = block in tree._pins and rank != HELD
        assert (rank >= PIN) == pinned, f"block {block} is ranked wrongly"
    count = sum(
        tree._rank[block] != HELD and depth < pinned_to[node]
        for block, (node, depth) in seen.items()
    )
    assert count == tree._num_pinned_idle, "pinned idle blocks are miscounted"
