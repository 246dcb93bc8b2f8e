"""Which resume point goes next: the one that saves least for each block it frees.

A point is worth the tokens that a request saves by going on there and not at the next
point above, for each block that is free when it goes. Points that were used lately
are worth more, by a clock that shows the worth of what went last: that is GreedyDual-
Size (Cao and Irani, 1997), with tokens for cost and blocks for size.

Where one path leads on from a point to another, requests go on from the deeper one:
the point above is *superseded*, and is worth nothing but how lately it was used. One
that shares all its blocks with the deeper one frees none, and stays: it is what is left
of the path when the deeper one goes.

Hints give points another *turn*: what is of no use any more goes before all that, and
what is to be kept after it, in the same order by worth. Neither sets the clock.
"""

import heapq
from collections.abc import Callable
from itertools import count

from vllm_radix.tree.resume.point import ResumePoint

_LEAST_QUEUED = 64
"""Entries up to which the queue is never cleaned."""

Rank = tuple[int, float]
"""A point's ``order``, and its worth: the lowest goes first."""


class ResumeEvictor:
    """A queue of points in the order of eviction, put right when they are taken.

    Args:
        worth: returns what a point saves for each block it frees; 0 blocks: None.

    Attributes:
        clock: the worth of what went last.
    """

    def __init__(self, worth: Callable[[ResumePoint], float | None]) -> None:
        self._worth = worth
        self._queue: list[tuple[Rank, int, ResumePoint]] = []
        self._numbers = count()
        # Points that would free nothing, as of when they were looked at.
        self._parked: list[ResumePoint] = []
        self._released = False
        self._most = _LEAST_QUEUED
        self.clock = 0.0

    def offer(self, point: ResumePoint) -> None:
        """Queue a point that may be worth less than before: O(log n)."""
        rank = point.turn, point.base
        if point.offered is None or rank < point.offered:
            self._push(point, rank)

    def note_released(self) -> None:
        """Note that blocks were released: points that freed nothing may free some."""
        self._released = True

    def take(self) -> ResumePoint | None:
        """Return the point to go next, or None: O(log n) for each looked at."""
        rank, point = self._next()
        if point is not None and not point.order:
            self.clock = max(self.clock, rank[1])
        return point

    def is_worth_room(self, worth: float) -> bool:
        """Return whether a new point of some worth would not be the next to go.

        O(log n) for each point looked at.
        """
        rank, point = self._next()
        if point is None:
            return False
        self._push(point, rank)
        return rank < (0, self.clock + worth)

    def _next(self) -> tuple[Rank, ResumePoint | None]:
        """Return the point to go next, taken from the queue, and its rank."""
        if self._released:
            self._released = False
            parked, self._parked = self._parked, []
            for point in parked:
                if point.alive and point.offered is None:
                    self._push(point, (point.turn, point.base))
        queue = self._queue
        while queue:
            rank, _, point = heapq.heappop(queue)
            if not point.alive or rank != point.offered:
                continue
            point.offered = None
            worth = self._worth(point)
            if worth is None:
                self._parked.append(point)
                continue
            now = point.order, point.base + worth
            if queue and now > queue[0][0]:
                self._push(point, now)
                continue
            return now, point
        return (0, 0.0), None

    def take_parked(self) -> ResumePoint | None:
        """Return the point that was used longest ago of those that free nothing alone.

        None if there is none. O(those).
        """
        parked = [p for p in self._parked if p.alive and p.offered is None]
        if not parked:
            return None
        point = min(parked, key=lambda p: (p.order, p.base))
        self._parked = [other for other in parked if other is not point]
        return point

    def _push(self, point: ResumePoint, rank: Rank) -> None:
        point.offered = rank
        heapq.heappush(self._queue, (rank, next(self._numbers), point))
        if len(self._queue) > self._most:
            # What was queued again elsewhere, or is gone: O(1) amortized.
            self._queue = [
                entry
                for entry in self._queue
                if entry[2].alive and entry[0] == entry[2].offered
            ]
            heapq.heapify(self._queue)
            self._most = max(_LEAST_QUEUED, 2 * len(self._queue))
