"""Which waiting requests to admit next, within bounds.

The default order decides with one set, the cached prefixes that waiting requests
need: a request overtakes only to keep them cached::

    the oldest request goes   while its uncached blocks fit beside what is needed, and,
                              if others share them, beside those who are warm already
    else the order's best     within the bounds below
    the plan ends             at the first request that does not fit the free blocks

The other orders always take their best. Bounds, in which the oldest goes instead:

- ``max_overtakes`` later ones were admitted before it: a hard bound;
- its turn, first come, first served, is ``max_extra_wait`` seconds ago: a hard bound;
- the order serves the oldest every k-th time (k-LPM, Dexter et al., 2025);
- some request would wait longer than first come, first served makes a newcomer
  wait, times ``patience``: the tail guard.

Only the oldest request needs watching for the hard bounds: a request that overtakes
a younger one without passing it has overtaken the older one too.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from vllm_radix.policy.arrivals import ArrivalTable
from vllm_radix.policy.fcfs_turns import FcfsTurns
from vllm_radix.policy.orders import FirstCome, Order
from vllm_radix.policy.queue_view import view_of_queue
from vllm_radix.policy.ranking import LongestPrefixHeap, ScoredRanking
from vllm_radix.policy.service_rate import ServiceRate
from vllm_radix.policy.tail_guard import TailGuard
from vllm_radix.policy.waiting_tree import WaitingRequest, WaitingTree


@dataclass(frozen=True)
class OvertakingBounds:
    """How far an order may go.

    Attributes:
        max_overtakes: most later requests admitted before a waiting one.
        max_extra_wait: most seconds that a request waits beyond its turn, first
            come, first served.
        patience: the wait that the tail guard allows, as a multiple of what a
            newcomer would wait, first come, first served.
    """

    max_overtakes: int = 1000
    max_extra_wait: float = 60.0
    patience: float = 1.0

    @property
    def forbid(self) -> bool:
        """Whether no request may overtake another."""
        return not self.max_overtakes


@dataclass(frozen=True)
class StepCapacity:
    """What a step can admit.

    Attributes:
        slots: requests that may be admitted.
        tokens: tokens that may be computed.
        blocks: blocks that are free, idle cached ones among them.
        needed: of them, the idle ones that waiting requests have cached.
        chunk: tokens of one prompt that may be computed; 0 for no such limit.
        adapters: LoRA adapters of the requests that run.
        max_adapters: adapters that a step can serve.
    """

    slots: int
    tokens: int
    blocks: int
    needed: int = 0
    chunk: int = 0
    adapters: frozenset[int] = frozenset()
    max_adapters: int = 1 << 30


@dataclass
class QueueState:
    """The waiting requests, as the planner sees them.

    Attributes:
        by_age: those that wait, the oldest first.
        tree: all of them by their tokens, and those that compute.
        table: those that wait, as arrays.
        ranking: of the default order; kept up to date by its owner.
        turns: when each request's turn came.
        rate: how fast requests are admitted.
        block_size: tokens in a block.
        num_warm: requests that have a cached prefix.
        warm_blocks: uncached blocks of those requests.
        last_sharer_before: returns the arrival of the last older request with the same
            cached prefix, or -1.
        idle_cached: returns how many blocks of a request's cached prefix are idle,
            and not held by those planned before; with True it notes that they are.
    """

    by_age: Collection[WaitingRequest]
    tree: WaitingTree
    table: ArrivalTable
    ranking: LongestPrefixHeap
    turns: FcfsTurns
    rate: ServiceRate
    block_size: int
    num_warm: int
    warm_blocks: int
    last_sharer_before: Callable[[WaitingRequest], int]
    idle_cached: Callable[[WaitingRequest, bool], int]


@dataclass
class PlannedAdmission:
    """A request to admit.

    Attributes:
        entry: the request.
        reason: ``turn``: it is the oldest; ``prefix``: the order says so; ``group``:
            so, and others share with it what it computes; ``overtakes``, ``wait``,
            ``every``, ``guard``: it is the oldest, and that bound called for it.
        tokens_saved: tokens that are cached now and would not be at its own turn.
    """

    entry: WaitingRequest
    reason: str
    tokens_saved: int = 0


@dataclass
class AdmissionPlanner:
    """Plans the admissions of a step.

    Attributes:
        order: which request would go first.
        bounds: how far that may go.
        pool_blocks: blocks of the cache.
        overtaking: admissions since the oldest request was served.
    """

    order: Order
    bounds: OvertakingBounds
    pool_blocks: int
    overtaking: int = field(default=0, init=False)

    def plan(
        self,
        state: QueueState,
        capacity: StepCapacity,
        now: float,
        unavailable: Iterable[WaitingRequest] = (),
        stands_back: Callable[[WaitingRequest], bool] | None = None,
    ) -> list[PlannedAdmission]:
        """Return the requests to admit, in order.

        The last one may not fit; vLLM stops its scan there. O(1) for each that goes
        in order of arrival; O(log n), and O(n) in numpy, for each that overtakes;
        O(group log n) for each that others share uncached blocks with. Orders other
        than the default rank all anew: O(n log n).

        Args:
            state: the waiting requests.
            capacity: what the step can admit.
            now: the time, in seconds.
            unavailable: requests that this step cannot admit.
            stands_back: returns whether fairness keeps a request back.
        """
        return _Plan(self, state, capacity, now, unavailable, stands_back).make()

    def note_admitted(self, oldest: bool) -> None:
        """Note an admission, and whether it was the oldest request's."""
        self.overtaking = 0 if oldest else self.overtaking + 1


class _Plan:
    """One plan in the making; the arguments are those of ``AdmissionPlanner.plan``."""

    def __init__(
        self,
        planner: AdmissionPlanner,
        state: QueueState,
        capacity: StepCapacity,
        now: float,
        unavailable: Iterable[WaitingRequest],
        stands_back: Callable[[WaitingRequest], bool] | None,
    ) -> None:
        self._order, self._bounds = planner.order, planner.bounds
        self._pool_blocks = planner.pool_blocks
        self._overtaking = planner.overtaking
        self._state, self._capacity, self._now = state, capacity, now
        self._out = {entry.arrival for entry in unavailable}
        self._blocked = set(self._out)
        self._stands_back = stands_back
        self._free, self._needed = capacity.blocks, capacity.needed
        self._num_warm, self._warm_blocks = state.num_warm, state.warm_blocks
        self._adapters = set(capacity.adapters)
        self._guard: TailGuard | None = None
        self._picks: list[PlannedAdmission] = []
        self._planned: set[int] = set()
        self._ages = iter(state.by_age)
        self._oldest: WaitingRequest | None = None
        self._in_turn = isinstance(self._order, FirstCome) or self._bounds.forbid
        self._ranking: LongestPrefixHeap | ScoredRanking = state.ranking
        state.ranking.forget_promises()
        if not (self._order.protects_needed or self._in_turn):
            self._ranking = self._rank_all()

    def _rank_all(self) -> ScoredRanking:
        state = self._state
        view = view_of_queue(state.tree, state.rate.work, state.block_size)
        entries = state.tree.entries()
        for at, entry in enumerate(entries):
            if entry.arrival in self._out:
                view.selectable[at] = False
        return ScoredRanking(self._order, view, entries)

    def make(self) -> list[PlannedAdmission]:
        """Return the plan."""
        capacity, used = self._capacity, 0
        while len(self._picks) < capacity.slots and used < capacity.tokens:
            oldest = self._find_oldest()
            if oldest is None:
                break
            entry, reason = self._choose(oldest)
            pick = PlannedAdmission(entry, reason)
            cached = self._ranking.cached(entry)
            used += max(1, entry.tokens - cached * self._state.block_size)
            idle = self._state.idle_cached(entry, True)
            if entry is not oldest:
                pick.tokens_saved = self._tokens_saved(entry)
            self._picks.append(pick)
            self._take(entry, entry is oldest)
            self._free -= entry.blocks - cached + idle
            self._needed -= idle
            if self._free < 0:
                break
            if self._promise_to_group(entry) and reason == "prefix":
                pick.reason = "group"
        return self._picks

    def _tokens_saved(self, entry: WaitingRequest) -> int:
        """Return the cached tokens that first come, first served, would have lost.

        By a request's own turn the older ones have taken their blocks; only those after
        the last one that uses the same prefix count. More than a pool of them, and the
        prefix has been evicted.
        """
        state = self._state
        since = state.last_sharer_before(entry)
        if state.table.blocks_between(since, entry.arrival) <= self._pool_blocks:
            return 0
        return entry.cached * state.block_size

    def _usable(self, entry: WaitingRequest) -> bool:
        """Return whether a request can be planned now."""
        if entry.arrival in self._out or entry.computing:
            return False
        adapter = entry.adapter
        full = len(self._adapters) >= self._capacity.max_adapters
        if adapter and full and adapter not in self._adapters:
            return False
        return self._stands_back is None or not self._stands_back(entry)

    def _find_oldest(self) -> WaitingRequest | None:
        if self._oldest is None or not self._usable(self._oldest):
            self._oldest = next(filter(self._usable, self._ages), None)
        return self._oldest

    def _choose(self, oldest: WaitingRequest) -> tuple[WaitingRequest, str]:
        """Return the request that goes next, and why."""
        if self._in_turn:
            return oldest, "turn"
        if self._order.protects_needed and self._fits_beside_needed(oldest):
            return oldest, "turn"
        best = self._ranking.best(self._usable)
        if best is None or best is oldest:
            return oldest, "turn"
        bound = self._bound(oldest, best)
        return (best, "prefix") if bound is None else (oldest, bound)

    def _fits_beside_needed(self, oldest: WaitingRequest) -> bool:
        """Return whether a request takes nothing that others need.

        What it shares with others stays needed once it is done. So it leaves room for
        the warm requests that can still go in this step: else more groups would be
        opened than the cache holds, and none served.
        """
        room = self._free - self._needed
        uncached = oldest.blocks - self._ranking.cached(oldest)
        if uncached > room:
            return False
        warm, blocks = self._num_warm, self._warm_blocks
        if self._ranking.cached(oldest):
            warm, blocks = warm - 1, blocks - uncached
        if warm <= 0 or next(self._sharers(oldest), None) is None:
            return True
        slots = self._capacity.slots - len(self._picks)
        return uncached <= room - blocks * min(1.0, slots / warm)

    def _sharers(self, entry: WaitingRequest) -> Iterator[tuple[WaitingRequest, int]]:
        """Yield the requests that wait for what a request is to compute.

        With the blocks that each shares with it. Planned ones hold theirs already.
        """
        planned = self._planned
        for other, common in self._state.tree.sharing_more(entry, self._ranking.cached):
            if not other.computing and other.arrival not in planned:
                yield other, common

    def _bound(self, oldest: WaitingRequest, best: WaitingRequest) -> str | None:
        """Return the bound that forbids ``best`` to overtake, if any."""
        state, bounds = self._state, self._bounds
        older = state.table.num_older(oldest.arrival)
        older -= sum(arrival < oldest.arrival for arrival in self._planned)
        overtaken = state.turns.overtaken(oldest.arrival, older, len(self._picks))
        if overtaken >= bounds.max_overtakes:
            return "overtakes"
        since = state.turns.since(oldest.arrival)
        if since is not None and self._now - since > bounds.max_extra_wait:
            return "wait"
        every = self._order.serve_oldest_every
        if every and self._overtaking + 1 >= every:
            return "every"
        if not self._order.uses_tail_guard:
            return None
        if not bounds.patience:
            return "guard"
        if self._guard is None:
            self._guard = TailGuard(
                state.table,
                self._blocked,
                [pick.entry.arrival for pick in self._picks],
                state.rate.work,
                state.rate.work_per_admission,
                state.rate.wait_limit * bounds.patience,
            )
        return None if self._guard.allows(best.arrival) else "guard"

    def _take(self, entry: WaitingRequest, oldest: bool) -> None:
        self._overtaking = 0 if oldest else self._overtaking + 1
        cached = self._ranking.cached(entry)
        if cached:
            self._num_warm -= 1
            self._warm_blocks -= entry.blocks - cached
        self._out.add(entry.arrival)
        self._planned.add(entry.arrival)
        if entry.adapter:
            self._adapters.add(entry.adapter)
        self._ranking.note_planned(entry)
        if self._guard is not None:
            self._guard.note_planned(entry.arrival)

    def _promise_to_group(self, entry: WaitingRequest) -> bool:
        """Note that what a planned request shares will be cached: O(its group)."""
        if self._in_turn:
            return False
        found = False
        # All are found before one is promised to: a promise ends the search.
        for other, common in list(self._sharers(entry)):
            before, found = self._ranking.cached(other), True
            self._num_warm += not before
            self._warm_blocks += (before or other.blocks) - common
            self._ranking.promise(other, common)
        return found
