"""Orders of waiting requests: who would go first, were there no bounds.

Each order gives every waiting request a tuple of scores, the lowest first; ties go
to the request that came first. What keeps an order from starving anybody is not
here but in ``plan``, and is the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_radix.policy.backlog import View
from vllm_radix.policy.groups import shares

Scores = Sequence[npt.NDArray[np.generic]]


class Order(ABC):
    """An order of waiting requests.

    Attributes:
        name: the value of the option ``policy``.
        guarded: whether the tail guard (see ``Pace``) keeps requests from waiting
            much longer than first come, first served; the hard bounds hold anyway.
        local: whether a request's score depends on that request alone.
        every: every so many admissions the oldest request is served, 0 for never.
    """

    name: str
    guarded = False
    local = True
    every = 0

    @abstractmethod
    def scores(self, view: View) -> Scores:
        """Return arrays of scores, the one that matters most first.

        Args:
            view: the waiting requests.
        """


class FirstCome(Order):
    """First come, first served: vLLM's own order."""

    name = "fcfs"

    def scores(self, view: View) -> Scores:
        """Return nothing: ties go to who came first."""
        return ()


class LongestPrefix(Order):
    """Longest cached prefix first, as SGLang's "lpm" (Zheng et al., 2024)."""

    name = "lpm"

    def scores(self, view: View) -> Scores:
        """Return the cached blocks, negative."""
        return (-view.cached,)


class KLongestPrefix(LongestPrefix):
    """Longest cached prefix first, and every eighth admission the oldest request.

    k-LPM (Dexter et al., "LLM query scheduling with prefix reuse and latency
    constraints", 2025), with k = 8.
    """

    name = "k-lpm"
    every = 8


class DepthFirst(Order):
    """Along the tree of waiting requests: the best order when all wait at once.

    Theorem 3.1 of Zheng et al. (2024). The subtree of what is cached comes first.
    """

    name = "dfs"
    local = False

    def scores(self, view: View) -> Scores:
        """Return what is shared with the warmest, negative, and the place."""
        count = len(view.cached)
        if not count:
            return ()
        warmest = int(np.argmax(np.where(view.left, view.cached, -1)))
        common = np.full(count, np.iinfo(np.int64).max)
        common[warmest + 1 :] = np.minimum.accumulate(view.shared[warmest + 1 :])
        common[:warmest] = np.minimum.accumulate(view.shared[warmest:0:-1])[::-1]
        return -common, np.arange(count)


class ResponseRatio(Order):
    """Highest response ratio next (Brinch Hansen, 1971): work, aged by waiting.

    The ratio of waiting to serving, both in tokens.
    """

    name = "hrrn"

    def scores(self, view: View) -> Scores:
        """Return the ratio, negative."""
        return (-view.age / view.uncached,)


class ShortestWork(Order):
    """Fewest uncached tokens first."""

    name = "shortest"

    def scores(self, view: View) -> Scores:
        """Return the uncached tokens."""
        return (view.uncached,)


class Horn(Order):
    """Horn's rule (1972): the group with the least work per request first."""

    name = "horn"
    local = False

    def scores(self, view: View) -> Scores:
        """Return the rate of the best group, then one's own part."""
        part, rate = shares(view)
        return rate, part


class Prefix(LongestPrefix):
    """The default: longest cached prefix first, guarded.

    What those before it in the plan will have cached counts as cached. So a group
    stays together from its first member on; groups are opened by their oldest.
    Every eighth admission is the oldest request's at the latest, so that a stream of
    one hot prefix cannot hold up the others.
    """

    name = "prefix"
    guarded = True
    every = 8


ORDERS: dict[str, type[Order]] = {
    order.name: order
    for order in (
        Prefix,
        FirstCome,
        LongestPrefix,
        KLongestPrefix,
        DepthFirst,
        ResponseRatio,
        ShortestWork,
        Horn,
    )
}
