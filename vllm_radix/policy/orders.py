"""Orders of waiting requests: which one would go first, were there no bounds.

Each order gives every waiting request a tuple of scores, the lowest first; ties go
to the request that came first. What keeps an order from starving a request is in
``planner`` and ``tail_guard``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_radix.policy.prefix_groups import work_shares
from vllm_radix.policy.queue_view import QueueView

Scores = Sequence[npt.NDArray[np.generic]]


class Order(ABC):
    """An order of waiting requests.

    Attributes:
        name: the value of the option ``policy``.
        protects_needed: whether a request overtakes only to keep cached what waiting
            requests need, and what they need is pinned; else the order always holds.
        uses_tail_guard: whether ``TailGuard`` keeps requests from waiting much longer
            than first come, first served; the hard bounds hold anyway.
        score_is_local: whether a request's score depends on that request alone.
        serve_oldest_every: every so many admissions the oldest request is served, 0
            for never.
    """

    name: str
    protects_needed = False
    uses_tail_guard = False
    score_is_local = True
    serve_oldest_every = 0

    @abstractmethod
    def scores(self, view: QueueView) -> Scores:
        """Return arrays of scores, the one that matters most first.

        Args:
            view: the waiting requests.
        """


class FirstCome(Order):
    """First come, first served: vLLM's own order."""

    name = "fcfs"

    def scores(self, view: QueueView) -> Scores:
        """Return no scores: ties go to the request that came first."""
        return ()


class LongestPrefix(Order):
    """Longest cached prefix first, as SGLang's "lpm" (Zheng et al., 2024)."""

    name = "lpm"

    def scores(self, view: QueueView) -> Scores:
        """Return the cached blocks, negative."""
        return (-view.cached,)


class KLongestPrefix(LongestPrefix):
    """Longest cached prefix first, and every eighth admission the oldest request.

    k-LPM (Dexter et al., "LLM query scheduling with prefix reuse and latency
    constraints", 2025), with k = 8.
    """

    name = "k-lpm"
    serve_oldest_every = 8


class DepthFirst(Order):
    """Along the tree of waiting requests: the best order when all wait at once.

    Theorem 3.1 of Zheng et al. (2024). The subtree of what is cached comes first.
    """

    name = "dfs"
    score_is_local = False

    def scores(self, view: QueueView) -> Scores:
        """Return what is shared with the warmest, negative, and the place."""
        count = len(view.cached)
        if not count:
            return ()
        warmest = int(np.argmax(np.where(view.selectable, view.cached, -1)))
        common = np.full(count, np.iinfo(np.int64).max)
        common[warmest + 1 :] = np.minimum.accumulate(view.shared[warmest + 1 :])
        common[:warmest] = np.minimum.accumulate(view.shared[warmest:0:-1])[::-1]
        return -common, np.arange(count)


class ResponseRatio(Order):
    """Highest response ratio next (Brinch Hansen, 1971): work, aged by waiting.

    The ratio of waiting to serving, both in tokens.
    """

    name = "hrrn"

    def scores(self, view: QueueView) -> Scores:
        """Return the ratio, negative."""
        return (-view.age / view.uncached,)


class ShortestWork(Order):
    """Fewest uncached tokens first."""

    name = "shortest"

    def scores(self, view: QueueView) -> Scores:
        """Return the uncached tokens."""
        return (view.uncached,)


class LeastWorkGroup(Order):
    """The group with the least work per request first.

    Horn, "Single-machine job sequencing with treelike precedence ordering" (1972).
    """

    name = "least-work-group"
    score_is_local = False

    def scores(self, view: QueueView) -> Scores:
        """Return the rate of the best group, then one's own part."""
        part, rate = work_shares(view)
        return rate, part


class Window(Order):
    """Cached prefixes first among the oldest few; never past a blocked request.

    A look-ahead over the head of the queue, as proposed for vLLM itself: with it a
    request overtakes at most ``width - 1`` others that wait before it.

    Attributes:
        width: requests that are looked at.
    """

    name = "window"
    score_is_local = False
    width = 32

    def scores(self, view: QueueView) -> Scores:
        """Return the cached blocks of the oldest few, negative, and 0 for others."""
        by_age = np.argsort(view.arrival)
        free = view.selectable[by_age]
        blocked = np.flatnonzero(~free & ~view.planned[by_age])
        end = blocked[0] if len(blocked) else len(by_age)
        inside = by_age[:end][free[:end]][: self.width]
        score = np.zeros(len(by_age), np.int64)
        score[inside] = -view.cached[inside]
        return (score,)


class ProtectNeeded(LongestPrefix):
    """The default: the oldest first, unless that would push out what others need.

    What waiting requests have cached is pinned. While the oldest request fits beside
    it, the oldest goes; else the longest cached prefix does, within the bounds, and
    so frees what it needs for the others. Storage and order decide with one set.
    """

    name = "prefix"
    protects_needed = True
    uses_tail_guard = True


ORDERS: dict[str, type[Order]] = {
    order.name: order
    for order in (
        ProtectNeeded,
        FirstCome,
        LongestPrefix,
        KLongestPrefix,
        DepthFirst,
        ResponseRatio,
        ShortestWork,
        LeastWorkGroup,
        Window,
    )
}
