"""The reason why a cached prefix ends where it does."""

from itertools import islice
from typing import NamedTuple

from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.eviction_history import EvictionHistory
from vllm_radix.tree.node import HOLE
from vllm_radix.tree.prefix_cache import Namespace, PrefixCache
from vllm_radix.tree.shape import Shape
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN

_MAX_NAMESPACES = 64


class Miss(NamedTuple):
    """Where a cached prefix ends, and why.

    Attributes:
        reason: ``none``: all that was asked for is cached. ``evicted``: the next
            block was cached and had to go. ``diverged``: what is cached goes on
            with other tokens. ``apart``: the tokens are cached in another
            namespace. ``unseen``: nothing cached goes on from here. ``unkept``: of a
            tree of resume points: the tokens are cached, and what else is needed to
            go on after them is not.
        token: the first token that is not cached.
        evicted_at: for ``evicted``, the time that ``EvictionHistory.now`` had; for
            ``unkept``, when what is needed was evicted, if it was.
    """

    reason: str
    token: int
    evicted_at: float | None = None


def explain(
    cache: PrefixCache,
    shape: Shape,
    history: EvictionHistory | None,
    key: bytes,
    namespace: Namespace,
    limit: int | None,
) -> Miss:
    """See ``RadixTree.explain``.

    Args:
        cache: the tree, to match with.
        shape: its nodes.
        history: what was evicted, if anything is kept of it.
        key: the tokens that were looked for.
        namespace: where.
        limit: most tokens to match.
    """
    match = cache.match(key, namespace, limit, partial=True)
    depth, size = match.num_blocks, cache.block_bytes
    shared = match.partial.num_tokens if match.partial else 0
    token = depth * cache.block_size + shared
    tokens = len(key) // BYTES_PER_TOKEN
    if token >= (tokens if limit is None else min(limit, tokens)):
        return Miss("none", token)
    following = bytes(key[depth * size : (depth + 1) * size])
    if history is not None and len(following) == size:
        above = match.blocks[-1] if depth else ChangeLog.root(namespace)
        when = history.evicted_at(above, following)
        if when is not None:
            return Miss("evicted", token, when)
    node = shape.path_end(key, namespace, depth)
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
    for other in islice(shape.roots, _MAX_NAMESPACES):
        if other != namespace and cache.match(key, other, limit).blocks:
            return Miss("apart", 0)
    return Miss("unseen", 0)
