"""Waiting requests, best first, in an order that changes as requests are planned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

import numpy as np

from vllm_radix.policy.orders import Order
from vllm_radix.policy.queue_view import QueueView
from vllm_radix.policy.waiting_tree import WaitingRequest

Usable = Callable[[WaitingRequest], bool]


class Ranking(ABC):
    """Waiting requests, best first."""

    @abstractmethod
    def best(self, usable: Usable) -> WaitingRequest | None:
        """Return the best request for which ``usable`` is true, if any."""

    @abstractmethod
    def promise(self, entry: WaitingRequest, cached: int) -> None:
        """Note that more of a request is cached once those planned are admitted.

        Args:
            entry: the request.
            cached: the blocks of its prefix that are cached then.
        """

    @abstractmethod
    def note_planned(self, entry: WaitingRequest) -> None:
        """Note that a request goes next."""


class LongestPrefixHeap(Ranking):
    """The request with the longest cached prefix first, kept from step to step.

    A heap of what was true when it was pushed; what is stale is dropped when it comes
    to the top. Requests without a cached prefix are not in it.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, WaitingRequest]] = []
        self._promised: dict[int, int] = {}

    def push(self, entry: WaitingRequest) -> None:
        """Add a request whose cached prefix has changed: O(log n), amortised."""
        if entry.cached:
            heappush(self._heap, (-entry.cached, entry.arrival, entry))

    def compact(self, entries: Iterable[WaitingRequest], count: int) -> None:
        """Rebuild the heap when most of it is stale: O(1), amortised.

        Args:
            entries: all requests that are looked up and wait.
            count: how many they are.
        """
        if len(self._heap) > 2 * count + 64:
            self._heap = [(-e.cached, e.arrival, e) for e in entries if e.cached]
            heapify(self._heap)

    def cached(self, entry: WaitingRequest) -> int:
        """Return a request's cached blocks, with what was promised."""
        return self._promised.get(entry.arrival, entry.cached)

    def promise(self, entry: WaitingRequest, cached: int) -> None:
        """Note what will be cached of a request: O(log n)."""
        self._promised[entry.arrival] = cached
        heappush(self._heap, (-cached, entry.arrival, entry))

    def forget_promises(self) -> None:
        """Note that a new step begins."""
        self._promised.clear()

    def note_planned(self, entry: WaitingRequest) -> None:
        """Do nothing: the caller's ``usable`` says so from now on."""

    def best(self, usable: Usable) -> WaitingRequest | None:
        """Return the usable request with most cached; ties go to the oldest.

        O(log n), and for each that is not usable.
        """
        heap = self._heap
        aside: list[tuple[int, int, WaitingRequest]] = []
        found = None
        while heap:
            top = heap[0]
            entry = top[2]
            if -top[0] != self.cached(entry) or not entry.waits:
                heappop(heap)
            elif usable(entry):
                found = entry
                break
            else:
                aside.append(heappop(heap))
        for top in aside:
            heappush(heap, top)
        return found


class ScoredRanking(Ranking):
    """The requests in any ``Order``, ranked anew for a step.

    Args:
        order: scores them.
        view: the requests as arrays; its ``cached``, ``selectable`` and ``planned``
            are changed.
        entries: the requests, in the order of the arrays.
    """

    def __init__(
        self, order: Order, view: QueueView, entries: list[WaitingRequest]
    ) -> None:
        self._order = order
        self._view = view
        self._entries = entries
        self._place = {entry.arrival: at for at, entry in enumerate(entries)}
        self._moved: list[tuple[tuple[float, ...], int]] = []
        self._rank()

    def _rank(self) -> None:
        """Score and sort all: O(n log n)."""
        self._keys = [*self._order.scores(self._view), self._view.arrival]
        self._places = np.lexsort(self._keys[::-1]).tolist()
        self._at = 0
        self._stale = False
        self._renewed: set[int] = set()
        self._moved.clear()

    def _key(self, place: int) -> tuple[float, ...]:
        return tuple(key[place] for key in self._keys)

    def promise(self, entry: WaitingRequest, cached: int) -> None:
        """Note what will be cached of a request: O(log n), or a new ranking."""
        place = self._place[entry.arrival]
        self._view.cached[place] = cached
        if not self._order.score_is_local:
            self._stale = True
            return
        some = self._view.at([place])
        for key, score in zip(self._keys, self._order.scores(some), strict=False):
            key[place] = score[0]
        heappush(self._moved, (self._key(place), place))
        self._renewed.add(place)

    def cached(self, entry: WaitingRequest) -> int:
        """Return a request's cached blocks, with what was promised."""
        place = self._place.get(entry.arrival)
        return entry.cached if place is None else int(self._view.cached[place])

    def note_planned(self, entry: WaitingRequest) -> None:
        """Note that a request goes next, O(1)."""
        place = self._place[entry.arrival]
        self._view.selectable[place] = False
        self._view.planned[place] = True

    def best(self, usable: Usable) -> WaitingRequest | None:
        """Return the first usable request: O(log n), and for each before it."""
        if self._stale:
            self._rank()
        while True:
            while self._at < len(self._places) and (
                self._places[self._at] in self._renewed
                or not self._selectable(self._places[self._at], usable)
            ):
                self._at += 1
            while self._moved and (
                self._moved[0][0] != self._key(self._moved[0][1])
                or not self._selectable(self._moved[0][1], usable)
            ):
                heappop(self._moved)
            ranked = self._at < len(self._places)
            if not ranked and not self._moved:
                return None
            if not ranked:
                return self._entries[self._moved[0][1]]
            place: int = self._places[self._at]
            if self._moved and self._moved[0] < (self._key(place), place):
                place = self._moved[0][1]
            return self._entries[place]

    def _selectable(self, place: int, usable: Usable) -> bool:
        return bool(self._view.selectable[place]) and usable(self._entries[place])
