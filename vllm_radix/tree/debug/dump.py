"""A radix tree as text, to be read in a terminal."""

from vllm_radix.tree.block_table import HELD, BlockTable
from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.shape import Shape
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN, decode

_MAX_BLOCKS = 8


def dump(shape: Shape, table: BlockTable, block_size: int, tokens: int) -> str:
    """See ``RadixTree.dump``."""
    lines = []
    for namespace, root in shape.roots.items():
        lines.append(f"namespace {namespace!r}")
        stack = [(node, 1) for node in root.children[::-1]]
        while stack:
            node, level = stack.pop()
            lines.append("  " * level + _describe(node, table, block_size, tokens))
            stack.extend((child, level + 1) for child in node.children[::-1])
    return "\n".join(lines) or "empty"


def _describe(node: Node, table: BlockTable, block_size: int, tokens: int) -> str:
    """Return the line of one node."""
    valid = len(node.key) // BYTES_PER_TOKEN
    if not node.partial:
        valid = len(node.blocks) * block_size
    shown = min(tokens, valid)
    edge = " ".join(map(str, decode(node.key[: BYTES_PER_TOKEN * shown])))
    edge += " ..." if shown < valid else ""
    blocks = ",".join("-" if b == HOLE else str(b) for b in node.blocks[:_MAX_BLOCKS])
    if len(node.blocks) > _MAX_BLOCKS:
        blocks += f",... {len(node.blocks)} in all"
    idle = sum(b != HOLE and table.ranks[b] != HELD for b in node.blocks)
    state = f"{idle} idle" if idle else "held"
    if node.partial:
        state += f", {valid} of {block_size} tokens"
    return f"[{edge}] blocks {blocks}, {state}"
