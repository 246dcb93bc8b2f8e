"""Why a request's prompt was not found in the cache, in words and in counts."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_radix.engine.compat import Request, logger
from vllm_radix.engine.resume_plans import ResumePlans
from vllm_radix.engine.tree_pool import TreeBlockPool
from vllm_radix.policy import PlannedAdmission
from vllm_radix.tree import BYTES_PER_TOKEN, Miss, Namespace, common_units
from vllm_radix.tree.resume import ResumeTree

PENDING = "pending"
"""In place of a tree's reason: another request is computing the tokens now."""

UNUSED = "unused"
"""The rest is cached, inside a block that was not worth, or not fit for, a copy."""

GIVEN_UP = "given up"
"""``unkept``, in a place that requests could go on from before."""

_WORDS = {
    "none": "that is all there can be",
    UNUSED: "the rest is in a block that was not copied",
    "evicted": "what follows was evicted {age:.1f} s ago",
    "diverged": "what is cached goes on with other tokens",
    "apart": "the same tokens are cached under another salt or LoRA adapter",
    "unseen": "nothing cached goes on from there",
    PENDING: "what follows is being computed for request {other} now",
    "unkept": "what follows is cached, but no window or state to go on from was kept",
    GIVEN_UP: "what follows is cached, but the window or state to go on from was "
    "evicted {age:.1f} s ago",
}

_COUNTED_AS = {"none": "complete", GIVEN_UP: "given_up"}
"""Names in metrics, where they differ."""

_PLACED = {
    "turn": "it was its turn",
    "prefix": "its prefix was cached",
    "group": "it opens a group that shares a prefix",
    "overtakes": "it had been overtaken max_overtakes times",
    "wait": "its turn had been max_extra_wait ago",
    "every": "every few admissions the oldest goes",
    "guard": "another order would have made it wait too long",
}


@dataclass(frozen=True)
class Placement:
    """Why a request was put where it was in the queue.

    Attributes:
        why: the reason; see ``vllm_radix.policy.PlannedAdmission``.
        arrival: its place in order of arrival.
        waited: seconds that it waited until it was placed.
        held: seconds that it waited for a prefix to be computed.
    """

    why: str
    arrival: int
    waited: float
    held: float

    def __str__(self) -> str:
        held = f", {self.held:.2f} s of them held" if self.held else ""
        return f"waited {self.waited:.2f} s{held}; {_PLACED[self.why]}"


class MissLog:
    """Finds the reason of each miss when a request is admitted, and logs it.

    Args:
        pool: whose cache it explains.
        clock: returns the time, in seconds.

    Attributes:
        missed_tokens: tokens to compute that were not cached, by reason: those of
            ``vllm_radix.tree.Miss``, ``pending``, ``unused`` and ``given up``.
        last: the last request admitted, its miss, and its cached tokens.
        placements: why each request was last put where it was, by id, until it is
            admitted.
    """

    def __init__(
        self, pool: TreeBlockPool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = pool
        self.clock = clock
        self._history = pool.tree.remember_evictions()
        self.missed_tokens: Counter[str] = Counter()
        self.last: tuple[str, Miss, int] | None = None
        self._looked: tuple[str, Miss, int, str] | None = None
        self._running: dict[str, Request] = {}
        self.placements: dict[str, Placement] = {}

    def new_step_starts(self) -> None:
        """Stamp what is evicted from now on."""
        self._history.now = self.clock()

    def record_plan(self, picks: Iterable[PlannedAdmission], now: float) -> None:
        """Record the reason for the place of each request in the plan of a step."""
        self.placements.clear()
        for pick in picks:
            entry = pick.entry
            self.placements[entry.id] = Placement(
                pick.reason, entry.arrival, now - entry.arrived_at, entry.held_for(now)
            )

    def record_lookup(self, request: Request, num_cached: int) -> None:
        """Find the reason, before the request's own blocks are in the tree.

        Args:
            request: looked up, and perhaps admitted.
            num_cached: tokens of the hit.
        """
        keys = self._pool.keys
        limit = request.num_tokens - 1
        key = keys.key(request, limit)
        namespace = keys.namespace(request)
        miss, other = self._explain(key, namespace, limit), ""
        if num_cached < limit:
            for computing in self._running.values():
                if keys.namespace(computing) == namespace and self._computes(
                    computing, key, num_cached, limit
                ):
                    miss, other = Miss(PENDING, num_cached), computing.request_id
                    break
        self._looked = request.request_id, miss, num_cached, other

    def _explain(self, key: bytes, namespace: Namespace, limit: int) -> Miss:
        return self._pool.tree.explain(key, namespace, limit)

    def _computes(
        self, computing: Request, key: bytes, num_cached: int, limit: int
    ) -> bool:
        """Return whether a running request computes what follows a hit."""
        # The block after the hit, as far as the request has tokens for it.
        size = self._pool.hash_block_size
        end = min((num_cached // size + 1) * size, limit)
        theirs = self._pool.keys.key(computing, min(end, computing.num_tokens))
        return theirs.startswith(key[: end * BYTES_PER_TOKEN])

    def record_admission(self, request: Request) -> None:
        """Count and log the reason of the look-up before."""
        if self._looked is None or self._looked[0] != request.request_id:
            return
        _, miss, num_cached, other = self._looked
        self._running[request.request_id] = request
        self._looked = None
        missed = request.num_tokens - 1 - num_cached
        if miss.reason == "none" and missed > 0:
            miss = Miss(UNUSED, num_cached)
        if miss.reason == "unkept" and miss.evicted_at is not None:
            miss = miss._replace(reason=GIVEN_UP)
        self.last = request.request_id, miss, num_cached
        self.missed_tokens[miss.reason] += max(0, missed)
        if not request.num_preemptions:
            reason = _COUNTED_AS.get(miss.reason, miss.reason)
            self._pool.tally.note_reason(reason, max(0, missed))
        why = _WORDS[miss.reason]
        age = self.clock() - (miss.evicted_at or 0.0)
        placement = self.placements.pop(request.request_id, None)
        logger.info(
            "Request %s: %d of %d tokens cached; %s (from token %d on)%s",
            request.request_id,
            num_cached,
            request.num_tokens,
            why.format(age=age, other=other),
            miss.token,
            f"; {placement}" if placement is not None else "",
        )

    def leave(self, request: Request) -> None:
        """Forget a request that ended or was preempted."""
        self.placements.pop(request.request_id, None)
        self._running.pop(request.request_id, None)


class PointMissLog(MissLog):
    """A ``MissLog`` of a cache where requests go on from resume points.

    Args:
        pool: whose cache it explains.
        plans: of the requests that run; they say what is worth a point.
        clock: returns the time, in seconds.
    """

    def __init__(
        self,
        pool: TreeBlockPool,
        plans: ResumePlans,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(pool, clock)
        self._plans = plans

    def _explain(self, key: bytes, namespace: Namespace, limit: int) -> Miss:
        tree = self._pool.tree
        assert isinstance(tree, ResumeTree)
        plans = self._plans
        return tree.explain(
            key, namespace, limit, least=plans.min_gap, grain=plans.grain
        )

    def _computes(
        self, computing: Request, key: bytes, num_cached: int, limit: int
    ) -> bool:
        """Return whether a running request is to compute what follows a hit."""
        end = min(limit, computing.num_tokens)
        theirs = self._pool.keys.key(computing, end)
        shared = common_units(key, 0, theirs, 0, BYTES_PER_TOKEN)
        place = self._plans.place(min(shared, end))
        gap = place - num_cached
        return gap >= self._plans.min_gap and computing.num_computed_tokens < place
