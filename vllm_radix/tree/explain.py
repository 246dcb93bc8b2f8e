"""Why a prefix was not found, or not further: in the words of its owner."""

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from vllm_radix.tree.base import Namespace
from vllm_radix.tree.keys import BYTES_PER_TOKEN
from vllm_radix.tree.node import HOLE

if TYPE_CHECKING:
    from vllm_radix.tree.radix_tree import RadixTree

_NAMESPACES = 64


class Miss(NamedTuple):
    """Where a cached prefix ends, and why.

    Attributes:
        reason: ``none``: all that was asked for is cached. ``evicted``: the next
            block was cached and had to go. ``diverged``: what is cached goes on
            with other tokens. ``apart``: the tokens are cached in another
            namespace. ``unseen``: nothing cached goes on from here.
        token: the first token that is not cached.
        evicted_at: for ``evicted``, the time that ``History.now`` had.
    """

    reason: str
    token: int
    evicted_at: float | None = None


def explain(
    tree: "RadixTree", key: bytes, namespace: Namespace, limit: int | None
) -> Miss:
    """See ``RadixTree.explain``."""
    match = tree.match(key, namespace, limit, partial=True)
    depth, size = match.num_blocks, tree.block_bytes
    shared = match.partial.num_tokens if match.partial else 0
    token = depth * tree.block_size + shared
    tokens = len(key) // BYTES_PER_TOKEN
    if token >= (tokens if limit is None else min(limit, tokens)):
        return Miss("none", token)
    root = tree._roots.get(namespace)
    following = bytes(key[depth * size : (depth + 1) * size])
    if tree.history is not None and len(following) == size:
        above = match.blocks[-1] if depth else ("root", namespace)
        when = tree.history.evicted_at(above, following)
        if when is not None:
            return Miss("evicted", token, when)
    node = tree._node[match.blocks[-1]] if depth else root
    if match.partial is not None:
        # At its end, or inside it: nothing else shares as much.
        ends = shared == match.partial.num_valid
        return Miss("unseen" if ends else "diverged", token)
    if token and node is not None:
        inside = depth - node.start
        below = node.blocks[inside : inside + 1]
        below = below or [child.blocks[0] for child in node.children]
        known = any(block != HOLE for block in below)
        return Miss("diverged" if known else "unseen", token)
    for other in islice(tree._roots, _NAMESPACES):
        if other != namespace and tree.match(key, other, limit).blocks:
            return Miss("apart", 0)
    return Miss("unseen", 0)
