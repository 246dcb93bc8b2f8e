"""Groups of waiting requests, and what their shared prefixes cost each of them.

A group is a run of neighbours in the backlog that share more blocks than are
cached. What of it is not cached is computed once, by whoever goes first, so each
member's part of it is its length over the number of members.
"""

import numpy as np

from vllm_radix.policy.queue_view import Floats, QueueView


def group_bounds(view: QueueView) -> list[tuple[int, int]]:
    """Return the first and last place of each group of two or more: O(n)."""
    joined = view.shared > view.cached
    joined[:1] = False
    edges = np.flatnonzero(np.diff(joined.astype(np.int8), append=0))
    # Edges come in pairs: the place before the first joined one, and the last.
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def work_shares(view: QueueView) -> tuple[Floats, Floats]:
    """Return each request's part of the work, and its best group's rate of work.

    O(n) in numpy, and in Python O(members) for the members of groups, times the
    depth of groups in groups.

    Returns:
        Tokens to compute for each request, a shared uncached block counted in
        parts; and the least tokens per request of the groups it is in, all of such
        a group's work counted (Horn, "Single-machine job sequencing with treelike
        precedence ordering", 1972, for unit weights).
    """
    part = view.uncached.astype(np.float64)
    rate = part.copy()
    for first, last in group_bounds(view):
        _split_group_work(view, first, last, part, rate)
    return part, rate


def _split_group_work(
    view: QueueView, first: int, last: int, part: Floats, rate: Floats
) -> None:
    """Share out the work of one group, a tree of common prefixes.

    Its nodes are found from left to right with a stack of open ones, as a suffix
    tree is from a sorted array, and closed with all that is below them known.
    """
    size = view.block_size
    tokens, shared = view.tokens.tolist(), view.shared.tolist()
    left = view.selectable.tolist()
    base = int(view.cached[first])
    # Open nodes: blocks at the end, first place, members, tokens below the end.
    stack: list[list[int]] = [[base, first, 0, 0]]
    # Closed ones: first and last place, tokens of the edge over its members, rate.
    nodes: list[tuple[int, int, float, float]] = []
    for place in range(first, last + 1):
        following = max(base, shared[place + 1]) if place < last else base
        deepest = max(stack[-1][0], following)
        if deepest > stack[-1][0]:
            stack.append([deepest, place, 0, 0])
        own = max(tokens[place] - deepest * size, 0)
        part[place] = own
        if left[place]:
            stack[-1][2] += 1
            stack[-1][3] += own
        while stack[-1][0] > following:
            end, begin, count, below = stack.pop()
            above = max(stack[-1][0], following)
            # What nobody needs who is left is not computed.
            edge = (end - above) * size if count else 0
            if above > stack[-1][0]:
                stack.append([above, begin, 0, 0])
            stack[-1][2] += count
            stack[-1][3] += below + edge
            members = max(count, 1)
            work = below + edge + (above - base) * size
            nodes.append((begin, place + 1, edge / members, work / members))
    for begin, end, each, pace in nodes:
        part[begin:end] += each
        np.minimum(rate[begin:end], pace, out=rate[begin:end])
