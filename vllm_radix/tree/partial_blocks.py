"""Blocks that match in part: where a look-up may go on inside one.

Siblings are sorted by their first block, partial ones among them, so those that share
the most tokens with a key are next to where it would be inserted.
"""

from bisect import bisect_left
from collections.abc import Mapping

from vllm_radix.tree.node import HOLE, Node
from vllm_radix.tree.prefix_cache import ALL_WRITTEN, PartialMatch
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN, common_units

_MAX_NEIGHBOURS = 64
"""Blocks looked at on each side, while they may not be copied from yet."""


def find_partial(
    node: Node, at: int, tokens: bytes, size: int, written: Mapping[int, int]
) -> tuple[PartialMatch | None, int]:
    """Return the block that shares most of ``tokens``, and how many were looked at.

    Args:
        node: the edge on which the whole blocks of the match end.
        at: blocks of this edge that match.
        tokens: up to a block of tokens, as they go on.
        size: bytes of a block's key.
        written: as for ``PrefixCache.match``.
    """
    if at < len(node.blocks):
        if node.blocks[at] == HOLE:
            return None, 0
        inside = node.key[at * size : (at + 1) * size]
        return _shared_part(tokens, inside, node.blocks[at], written), 0
    best: PartialMatch | None = None
    looked = 0
    keys = node.child_keys
    index = bisect_left(keys, tokens)
    right = range(index, min(len(keys), index + _MAX_NEIGHBOURS))
    left = range(index - 1, max(-1, index - 1 - _MAX_NEIGHBOURS), -1)
    for side in (right, left):
        for i in side:
            looked += 1
            block = node.children[i].blocks[0]
            found = _shared_part(tokens, keys[i], block, ALL_WRITTEN)
            # Those farther away share no more.
            if found is None or (best and found.num_tokens <= best.num_tokens):
                break
            usable = min(found.num_tokens, written.get(block, found.num_tokens))
            if block != HOLE and usable > (best.num_tokens if best else 0):
                best = found._replace(num_tokens=usable)
            if block != HOLE and block not in written:
                break
    return best, looked


def _shared_part(
    tokens: bytes,
    key: bytes | bytearray,
    block: int,
    written: Mapping[int, int],
) -> PartialMatch | None:
    """Return how far a block of this key serves ``tokens``, if at all."""
    if tokens[:BYTES_PER_TOKEN] != key[:BYTES_PER_TOKEN]:
        return None  # as for most neighbours
    shared = common_units(tokens, 0, key, 0, BYTES_PER_TOKEN)
    shared = min(shared, written.get(block, shared))
    valid = len(key) // BYTES_PER_TOKEN
    return PartialMatch(block, shared, valid) if shared else None


def has_block_starting_with(node: Node, at: int, tokens: bytes, size: int) -> bool:
    """Return whether a block behind ``at`` of an edge starts with all of ``tokens``."""
    if at < len(node.blocks):
        here = node.key[at * size : (at + 1) * size]
        return node.blocks[at] != HOLE and here.startswith(tokens)
    for i in range(bisect_left(node.child_keys, tokens), len(node.child_keys)):
        if not node.child_keys[i].startswith(tokens):
            break
        if node.children[i].blocks[0] != HOLE:
            return True
    return False


def subsumed_partial(node: Node, tokens: bytes) -> Node | None:
    """Return the partial block below a node of which ``tokens`` are a continuation."""
    at = bisect_left(node.child_keys, tokens) - 1
    if at < 0:
        return None
    child = node.children[at]
    return child if child.partial and tokens.startswith(child.key) else None
