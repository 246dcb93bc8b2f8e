"""Which waiting requests to admit next, within bounds.

An order (``orders``) says who would go first; the plan walks down it and serves the
oldest request instead whenever a bound says so:

- ``max_overtakes`` later ones were admitted before it: a hard bound;
- its turn, first come, first served, is ``max_extra_wait`` seconds ago: a hard bound;
- the order serves every k-th time the oldest (k-LPM, Dexter et al., 2025);
- else some request would wait longer than first come, first served makes a newcomer
  wait (``Pace``), times ``patience``: the tail guard.

Only the oldest request needs watching for the hard bounds: whoever overtakes a
younger one that it has not passed has overtaken the older one too.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from vllm_radix.policy.backlog import Ints, View
from vllm_radix.policy.groups import mates
from vllm_radix.policy.orders import Order
from vllm_radix.policy.pace import Turns

_TRIES = 16
"""Requests passed over because they do not fit, before the plan gives up."""


@dataclass(frozen=True)
class Bounds:
    """How far an order may go.

    Attributes:
        max_overtakes: most later requests admitted before a waiting one.
        max_extra_wait: most seconds that a request waits beyond its turn, first
            come, first served.
        patience: of the tail guard, as a multiple of the wait that it allows.
    """

    max_overtakes: int = 1000
    max_extra_wait: float = 60.0
    patience: float = 0.8


@dataclass(frozen=True)
class Room:
    """What there is to give away in a step.

    Attributes:
        slots: requests that may be admitted.
        tokens: that may be computed.
        blocks: that are free.
        chunk: tokens of one prompt that may be computed; 0 for no such limit.
    """

    slots: int
    tokens: int
    blocks: int
    chunk: int = 0


@dataclass
class Pick:
    """A request to admit.

    Attributes:
        place: in the view.
        why: ``turn``: it is the oldest; ``prefix``: the order says so; ``group``:
            it opens a group; ``overtakes``, ``wait``, ``every``, ``guard``: it is
            the oldest, and that bound called for it.
        saved: tokens that are cached now and would not be at its own turn.
    """

    place: int
    why: str
    saved: int = 0


@dataclass
class Planner:
    """Plans admissions; what it keeps between steps is who was served last.

    Attributes:
        order: who would go first.
        bounds: how far that may go.
        pool_blocks: blocks of the cache.
        overtaking: admissions since the oldest request was served.
        ranked: places that the last plan left, best first.
    """

    order: Order
    bounds: Bounds
    pool_blocks: int
    overtaking: int = field(default=0, init=False)
    ranked: list[int] = field(default_factory=list, init=False)

    def plan(
        self,
        view: View,
        room: Room,
        turns: Turns,
        now: float,
        limit: float,
        barred: Collection[int] = (),
    ) -> list[Pick]:
        """Return who to admit, in order, until the room is used up.

        O(n log n), O(n) in numpy for each pick, and O(group log n) for each that
        opens one; of orders that are not ``local``, O(n log n) for those.

        Args:
            view: the waiting requests; its ``left`` and ``cached`` are used up.
            room: what a step can admit.
            turns: when each request's turn came.
            now: the time, in seconds.
            limit: the wait that the guard allows, in work; see ``Pace``.
            barred: places not to be picked, by fairness.
        """
        for place in barred:
            view.left[place] = False
        by_age = np.argsort(view.arrival)
        waits = _Waits(view, by_age, limit * self.bounds.patience)
        lost = np.where(self._lost(view, by_age), view.cached, 0) * view.block_size
        # Held and barred ones wait as well.
        ahead = np.cumsum((view.waits & ~view.left)[by_age])
        picks: list[Pick] = []
        overtaking = self.overtaking
        ranked = _Ranked(self.order, view)
        oldest = used = 0
        blocks = room.blocks
        while len(picks) < room.slots and used < room.tokens:
            while oldest < len(by_age) and not view.left[by_age[oldest]]:
                oldest += 1
            if oldest == len(by_age):
                break
            first = int(by_age[oldest])
            chosen = ranked.best(blocks)
            why = "prefix"
            if chosen == first:
                why = "turn"
            else:
                arrival = int(view.arrival[first])
                overtaken = len(picks) + turns.overtaken(arrival, int(ahead[oldest]))
                since = turns.since(arrival)
                if overtaken >= self.bounds.max_overtakes:
                    why = "overtakes"
                elif since is not None and now - since > self.bounds.max_extra_wait:
                    why = "wait"
                elif self.order.every and overtaking + 1 >= self.order.every:
                    why = "every"
                elif self.order.guarded and (
                    not self.bounds.patience or not waits.allow(chosen)
                ):
                    why = "guard"
                if why != "prefix":
                    chosen = first
            overtaking = 0 if chosen == first else overtaking + 1
            view.left[chosen] = False
            waits.pick(chosen)
            used += int(view.uncached[chosen])
            blocks -= int(view.blocks[chosen] - view.cached[chosen])
            pick = Pick(chosen, why, int(lost[chosen]))
            picks.append(pick)
            if self._open(view, chosen, ranked) and why == "prefix":
                pick.why = "group"
        self.ranked = ranked.rest()
        return picks

    def admitted(self, oldest: bool) -> None:
        """Note an admission, and whether it was the oldest request's."""
        self.overtaking = 0 if oldest else self.overtaking + 1

    def _lost(self, view: View, by_age: Ints) -> npt.NDArray[np.bool_]:
        """Return for each place whether its prefix would be gone at its turn.

        By then all older ones have taken their blocks: more than a pool of them,
        and the prefix has been evicted.
        """
        needed = (view.blocks - view.cached)[by_age]
        before = np.cumsum(needed) - needed
        lost = np.zeros(len(by_age), np.bool_)
        lost[by_age] = before > self.pool_blocks
        return lost

    @staticmethod
    def _open(view: View, place: int, ranked: "_Ranked") -> bool:
        """Note that what a picked request shares will be cached: O(its group)."""
        found = mates(view.shared, place, view.cached)
        view.cached[place] = view.blocks[place]
        for other, common in found:
            view.cached[other] = common
        if found:
            ranked.renew([other for other, _ in found])
        return bool(found)


class _Ranked:
    """Places in an order that changes as requests are picked.

    Args:
        order: how to score.
        view: the waiting requests.
    """

    def __init__(self, order: Order, view: View) -> None:
        self._order = order
        self._view = view
        # Places whose score has changed since, with it.
        self._moved: list[tuple[tuple[float, ...], int]] = []
        self._renewed: set[int] = set()
        self._rank()

    def _rank(self) -> None:
        self._keys = [*self._order.scores(self._view), self._view.arrival]
        self._places = np.lexsort(self._keys[::-1]).tolist()
        self._at = 0
        self._moved.clear()
        self._renewed.clear()

    def _key(self, place: int) -> tuple[float, ...]:
        return tuple(key[place] for key in self._keys)

    def best(self, blocks: int) -> int:
        """Return the first that fits into so many blocks, or else the first.

        O(log n) for each that does not fit, of which a few are tried.
        """
        view = self._view
        passed: dict[int, tuple[float, ...]] = {}
        chosen = -1
        while chosen < 0 and len(passed) < _TRIES:
            while self._moved and not self._is_current(*self._moved[0]):
                heappop(self._moved)
            while self._at < len(self._places) and not self._stands(self._at):
                self._at += 1
            ranked = self._at < len(self._places)
            if ranked:
                place = self._places[self._at]
                entry = self._key(place), place
                if not self._moved or entry <= self._moved[0]:
                    self._at += 1
                else:
                    entry = heappop(self._moved)
            elif self._moved:
                entry = heappop(self._moved)
            else:
                break
            key, place = entry
            passed[place] = key
            if view.blocks[place] - view.cached[place] <= blocks:
                chosen = place
        for place, key in passed.items():
            heappush(self._moved, (key, place))
        return chosen if chosen >= 0 else next(iter(passed))

    def _is_current(self, key: tuple[float, ...], place: int) -> bool:
        return bool(self._view.left[place]) and key == self._key(place)

    def renew(self, places: list[int]) -> None:
        """Score some again: O(their number), and O(n log n) if all scores change."""
        if not self._order.local:
            self._rank()
            return
        some = self._view.at(places)
        for key, scores in zip(self._keys, self._order.scores(some), strict=False):
            key[places] = scores
        for place in places:
            if self._view.left[place]:
                heappush(self._moved, (self._key(place), place))
                self._renewed.add(place)

    def rest(self) -> list[int]:
        """Return those that are left, best first, as far as is known cheaply."""
        moved = [p for key, p in sorted(self._moved) if self._is_current(key, p)]
        rest = range(self._at, len(self._places))
        standing = [self._places[at] for at in rest if self._stands(at)]
        return list(dict.fromkeys([*moved, *standing]))

    def _stands(self, at: int) -> bool:
        """Whether a place is still where it was ranked."""
        place = self._places[at]
        return bool(self._view.left[place]) and place not in self._renewed


class _Waits:
    """Whether the others can wait until one more has overtaken them.

    Args:
        view: the waiting requests.
        by_age: places in order of arrival.
        limit: longest wait, in work.
    """

    def __init__(self, view: View, by_age: Ints, limit: float) -> None:
        self._pace = view.pace
        alive = view.left[by_age]
        position: Ints = np.cumsum(alive) - alive
        # Work that each can spare, if all are served by age from now on.
        self._spare = limit - view.age[by_age] - position * view.pace
        self._spare[~alive] = np.inf
        self._at = np.empty(len(by_age), np.int64)
        self._at[by_age] = np.arange(len(by_age))

    def allow(self, place: int) -> bool:
        """Return whether a request may overtake all older ones: O(n) in numpy."""
        older = self._spare[: self._at[place]]
        return not len(older) or bool(older.min() >= self._pace)

    def pick(self, place: int) -> None:
        """Note that a request goes next."""
        at = self._at[place]
        self._spare[at] = np.inf
        self._spare[:at] -= self._pace
