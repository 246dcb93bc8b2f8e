"""Which waiting request next: longest cached prefix, with a hard bound.

Longest prefix first is SGLang's order (Zheng et al., 2024): what is cached now
is used before it is evicted. Alone it starves a request whose prefix is never
cached, so each request counts how often it was overtaken, and past the bound it
goes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Waiting:
    """What the order needs to know about a waiting request.

    Attributes:
        arrival: place in order of arrival; unique.
        cached: blocks of its prefix that are cached now.
        total: blocks of its prompt.
        overtaken: admissions, since it arrived, of requests that came later.
    """

    arrival: int
    cached: int = 0
    total: int = 0
    overtaken: int = 0


def needs_order(waiting: Sequence[Waiting], blank_blocks: int) -> bool:
    """Whether an order other than first come, first served can gain anything.

    It cannot when all that waits fits into blocks that hold nothing: then no
    cached prefix is evicted before its turn. Nor when nothing is cached. O(n).

    Args:
        waiting: the requests.
        blank_blocks: free blocks without cached content.
    """
    needed = sum(entry.total - entry.cached for entry in waiting)
    return needed > blank_blocks and any(entry.cached for entry in waiting)


def prefix_order(waiting: Sequence[Waiting], max_overtakes: int) -> list[int]:
    """Return the order of admission: indices into ``waiting``.

    Longest cached prefix first, then order of arrival, and no request behind
    more than ``max_overtakes - overtaken`` later ones: admitting the requests
    in this order, however many of them, keeps the bound. O(n log n).

    Only the oldest request left needs watching: whoever overtakes a younger
    one that it has not passed has overtaken the older one too.

    Args:
        waiting: the requests, in any order.
        max_overtakes: the bound.
    """
    by_arrival = sorted(range(len(waiting)), key=lambda i: waiting[i].arrival)
    by_prefix = sorted(by_arrival, key=lambda i: -waiting[i].cached)
    placed = [False] * len(waiting)
    order: list[int] = []
    rank = 0  # of the oldest request left, in order of arrival
    best = 0
    while len(order) < len(waiting):
        while placed[by_arrival[rank]]:
            rank += 1
        oldest = by_arrival[rank]
        passed = len(order) - rank  # later ones placed before the oldest
        if waiting[oldest].overtaken + passed >= max_overtakes:
            chosen = oldest
        else:
            while placed[by_prefix[best]]:
                best += 1
            chosen = by_prefix[best]
        placed[chosen] = True
        order.append(chosen)
    return order
