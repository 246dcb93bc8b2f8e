"""A radix tree as text, to be read in a terminal."""

from typing import TYPE_CHECKING

from vllm_radix.tree.keys import BYTES_PER_TOKEN, decode
from vllm_radix.tree.node import HOLE, Node

if TYPE_CHECKING:
    from vllm_radix.tree.radix_tree import RadixTree

_BLOCKS = 8


def dump(tree: "RadixTree", tokens: int) -> str:
    """See ``RadixTree.dump``."""
    lines = []
    for namespace, root in tree._roots.items():
        lines.append(f"namespace {namespace!r}")
        stack = [(node, 1) for node in root.children[::-1]]
        while stack:
            node, level = stack.pop()
            lines.append("  " * level + _describe(tree, node, tokens))
            stack.extend((child, level + 1) for child in node.children[::-1])
    return "\n".join(lines) or "empty"


def _describe(tree: "RadixTree", node: Node, tokens: int) -> str:
    partial = tree._is_partial(node)
    valid = len(node.key) // BYTES_PER_TOKEN
    if not partial:
        valid = len(node.blocks) * tree.block_size
    shown = min(tokens, valid)
    edge = " ".join(map(str, decode(node.key[: BYTES_PER_TOKEN * shown])))
    edge += " ..." if shown < valid else ""
    blocks = ",".join("-" if b == HOLE else str(b) for b in node.blocks[:_BLOCKS])
    if len(node.blocks) > _BLOCKS:
        blocks += f",... {len(node.blocks)} in all"
    idle = sum(tree.is_idle(block) for block in node.blocks)
    state = f"{idle} idle" if idle else "held"
    if partial:
        state += f", {valid} of {tree.block_size} tokens"
    return f"[{edge}] blocks {blocks}, {state}"
