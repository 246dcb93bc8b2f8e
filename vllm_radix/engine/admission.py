"""The order in which vLLM reads the waiting requests, decided before each step.

Joins vLLM's queue, the tree of waiting requests, their look-ups in the cache, the
requests that are held back and the planner: once a step, the plan is made and given
to the queue.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import Request, RequestStatus, SchedulerOutput
from vllm_radix.engine.grammar_waits import GrammarWaits
from vllm_radix.engine.holds import Holds
from vllm_radix.engine.lookups import PrefixLookups
from vllm_radix.engine.queue import PrefixQueue
from vllm_radix.engine.stuck_plan import StuckPlan
from vllm_radix.engine.tenants import Tenants
from vllm_radix.engine.tree_manager import TreeKVCacheManager
from vllm_radix.policy import (
    ORDERS,
    AdmissionPlanner,
    ArrivalTable,
    FcfsTurns,
    FirstCome,
    LongestPrefixHeap,
    OvertakingBounds,
    PlannedAdmission,
    QueueState,
    ServiceRate,
    StepCapacity,
    WaitingRequest,
    WaitingTree,
)
from vllm_radix.tree import Node

_LOADING = RequestStatus.WAITING_FOR_REMOTE_KVS

MAX_NEW_PER_STEP = 512
"""New requests that are looked up in one step; the others follow in the next."""


class AdmissionController:
    """Plans which waiting requests vLLM reads first.

    Args:
        manager: of the cache.
        config: the options.
        computing: requests that compute their prompts in chunks, or load them;
            vLLM's own set.
        clock: returns the time, in seconds.

    Attributes:
        queue: the waiting requests, in place of vLLM's queue.
        blocked_this_step: ids of requests that this step cannot admit: held, or
            waiting for a grammar.
    """

    def __init__(
        self,
        manager: TreeKVCacheManager,
        config: RadixConfig,
        computing: set[Request],
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._pool = manager.block_pool
        self._tree = manager.block_pool.tree
        self._size = self._tree.block_size
        self._config = config
        self._clock = clock
        self._prefilling = computing
        self.queue = PrefixQueue(self._on_arrival)
        # The requests that wait, in order of arrival; those that compute; those that
        # wait for a grammar; and those that are yet to be looked up.
        self._waiting: dict[str, WaitingRequest] = {}
        self._computing: dict[str, WaitingRequest] = {}
        self._grammars = GrammarWaits()
        self._new: dict[str, WaitingRequest] = {}
        self._arrivals = 0
        # Blocks to compute for all that wait, shared ones once; and requests that
        # shared some with an older one when they came.
        self._uncached_blocks = 0
        self._num_sharing = 0
        self._tenants = Tenants(config)
        self._order = ORDERS[config.policy]()
        self._waiting_tree = WaitingTree(self._tree.block_bytes)
        self._table = ArrivalTable()
        self._heap = LongestPrefixHeap()
        self._rate = ServiceRate()
        self._turns = FcfsTurns()
        self._lookups = PrefixLookups(
            self._tree, self._order.protects_needed, self._on_look_up
        )
        bounds = OvertakingBounds(
            config.max_overtakes, config.max_extra_wait, config.patience
        )
        blocks = manager.units(self._pool.num_gpu_blocks)
        self._planner = AdmissionPlanner(self._order, bounds, blocks)
        # While everything fits but fairness is asked for.
        self._in_turn = AdmissionPlanner(FirstCome(), bounds, blocks)
        self._holds = Holds(
            self._waiting_tree, self._waiting, self._may_be_held, self._size
        )
        if manager.plans is not None:
            manager.plans.waiting = self._waiting_tree
        self._follow_ups = manager.make_follow_ups()
        self._taken: dict[Node, int] = {}
        self._picks: dict[str, PlannedAdmission] = {}
        self._changes = 0
        self._stuck: StuckPlan | None = None
        self.blocked_this_step: set[str] = set()

    @property
    def num_known(self) -> int:
        """How many requests are known: waiting, or computing in chunks."""
        return len(self._waiting) + len(self._computing)

    def overtaken(self, request_id: str) -> int | None:
        """Return how often a waiting request was overtaken: O(n); None for others."""
        entry = self._waiting.get(request_id)
        return None if entry is None else self._overtaken(entry)

    def _overtaken(self, entry: WaitingRequest) -> int:
        older = self._table.num_older(entry.arrival)
        return self._turns.overtaken(entry.arrival, older)

    @property
    def num_held(self) -> int:
        """How many requests are held until another has computed what they share."""
        return len(self._holds.held)

    @property
    def longest_overtaking(self) -> int:
        """How often the waiting request was overtaken that was so most: O(1)."""
        oldest = next(iter(self._waiting.values()), None)
        return 0 if oldest is None else self._turns.overtaken(oldest.arrival, 0)

    @property
    def longest_extra_wait(self) -> float:
        """Seconds since the turn, first come, first served, of the oldest: O(1)."""
        oldest = next(iter(self._waiting.values()), None)
        since = None if oldest is None else self._turns.since(oldest.arrival)
        return 0.0 if since is None else max(0.0, self._clock() - since)

    # -- requests come and go --------------------------------------------------

    def _on_arrival(self, request: Request) -> None:
        """Note a request that came into the queue."""
        # Its KV was loaded in vain, and it waits again.
        before = self._computing.pop(request.request_id, None)
        if before is not None:
            self._waiting_tree.remove(before)
        self._take(request.request_id)
        self._manager.note_arrival(request.num_tokens)
        keys = self._pool.keys
        # At least one token is computed, for its logits.
        whole = (request.num_tokens - 1) // self._size
        if not self._manager.prefix_cache_lookup_enabled(request):
            whole = 0
        key = keys.key(request, whole * self._size)
        key = bytes(key[: whole * self._tree.block_bytes])
        lora = request.lora_request
        entry = WaitingRequest(
            request.request_id,
            self._arrivals,
            self._clock(),
            self._rate.work,
            key,
            keys.namespace(request),
            request.num_tokens,
            -(-request.num_tokens // self._size),
            tenant=self._tenants.name_of(request),
            adapter=0 if lora is None else lora.lora_int_id,
        )
        self._arrivals += 1
        self._waiting[entry.id] = entry
        self._new[entry.id] = entry
        self._table.add(entry.arrival, entry.arrived_at_work, entry.blocks)
        self._uncached_blocks += entry.blocks
        self._tenants.note_waiting(entry.tenant)
        self._grammars.add(request)
        self._changes += 1

    def forget_rates(self) -> None:
        """Reset the service rate and the counter of overtakes; keep the requests."""
        work = self._rate.work
        self._rate = ServiceRate()
        self._rate.work = work
        self._planner.overtaking = 0

    def remove(self, request: Request) -> None:
        """Forget a request that ended, if it is known."""
        request_id = request.request_id
        if request_id in self._computing:
            self._waiting_tree.remove(self._computing.pop(request_id))
        elif self._take(request_id) is not None:
            self._depart(self._clock(), 1)
        self._follow_ups.note_finished(request)
        self._tenants.charge(self._tenants.name_of(request), request.num_output_tokens)

    def _take(self, request_id: str, keep: bool = False) -> WaitingRequest | None:
        """Take a request off the waiting ones; ``keep`` it in their tree."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return None
        self._grammars.remove(request_id)
        self._table.remove(entry.arrival)
        self._uncached_blocks -= entry.own_uncached
        self._num_sharing -= entry.shared_before > 0
        self._tenants.note_gone(entry.tenant)
        followed = self._lookups.forget(entry)
        self._new.pop(request_id, None)
        if keep and not followed:
            self._waiting_tree.add(entry)
        elif followed and not keep:
            self._waiting_tree.remove(entry)
        entry.waits = False
        self._changes += 1
        return entry

    def _depart(self, now: float, count: int) -> None:
        oldest = next(iter(self._waiting.values()), None)
        arrival = oldest.arrival if oldest is not None else self._arrivals
        self._turns.depart(now, count, arrival)

    def _on_look_up(self, entry: WaitingRequest, before: int) -> None:
        """Note how much of a request is cached, and its ``own_uncached`` before."""
        self._uncached_blocks += entry.own_uncached - before
        self._heap.push(entry)

    def _catch_up(self) -> None:
        """Look up new requests, and again those that the tree's news concern."""
        if self._lookups.catch_up():
            self._changes += 1
        if not self._new:
            return
        new = list(self._new.values())[:MAX_NEW_PER_STEP]
        if len(new) == len(self._new):
            self._new.clear()
        else:
            for entry in new:
                del self._new[entry.id]
        self._waiting_tree.add_all(new)
        for entry in new:
            self._num_sharing += entry.shared_before > 0
            self._uncached_blocks += entry.own_uncached - entry.blocks
            self._lookups.look_up(entry)
            if self._follow_ups.recognizes(entry, self._lookups.end_block(entry)):
                self._rate.num_follow_ups += 1
        self._heap.compact(
            (e for e in self._waiting.values() if e in self._lookups),
            len(self._lookups),
        )

    # -- before a step ---------------------------------------------------------

    def skip_step(self, now: float) -> None:
        """Note that a step is to admit no request.

        Those held for blocks are released; not those for a resume point.
        """
        self._begin_step()
        plans = self._manager.plans if self._config.hold else None
        held = set() if plans is None else self._holds.behind_plans(plans, now)
        self.queue.set_plan([], held)
        self._picks = {}
        if self._holds.held or held:
            self._holds.settle(held, now)
        self.blocked_this_step = set(held)

    def _begin_step(self) -> None:
        self.blocked_this_step = set()
        if self._computing:
            ids = {request.request_id for request in self._prefilling}
            for request_id in [i for i in self._computing if i not in ids]:
                self._waiting_tree.remove(self._computing.pop(request_id))
        self._lookups.skip()

    def plan_step(self, capacity: StepCapacity, now: float) -> None:
        """Give the queue the plan of the next step.

        O(what has changed), and as ``AdmissionPlanner.plan``; O(1) if everything
        fits or nothing has changed since no request could be admitted.

        Args:
            capacity: what the step can admit.
            now: the time, in seconds.
        """
        self._begin_step()
        self._catch_up()
        protects, units = self._order.protects_needed, self._manager.units
        needed = units(self._tree.num_pinned_idle) if protects else 0
        capacity = replace(capacity, blocks=units(capacity.blocks), needed=needed)
        if self._stuck is not None and self._stuck.holds(
            capacity, self._changes, self._rate.work
        ):
            self.queue.set_plan(self._stuck.plan)
            return
        self._stuck = None
        held = self._hold_behind_running(capacity, now)
        blocked = held | self._grammars.ids()
        # Only as long as the rate is not measured: O(n).
        guess = 0.0 if self._rate.known else self._table.mean_blocks() * self._size
        self._rate.observe_queue(len(self.queue), guess)
        over_quota = self._tenants.over_quota(self._waiting, blocked)
        picks: list[PlannedAdmission] = []
        fits = self._everything_fits(capacity)
        if not fits or over_quota:
            picks = self._plan(capacity, now, blocked, over_quota, fits)
        if self._config.hold and (capacity.chunk or self._manager.plans is not None):
            held |= self._hold_behind_starting(picks, held, blocked, capacity, now)
            blocked |= held
        self._holds.settle(held, now)
        self.blocked_this_step = blocked
        plan = [pick.entry.id for pick in picks if pick.entry.id not in held]
        self.queue.set_plan(plan, held)
        self._picks = {pick.entry.id: pick for pick in picks}
        if self._manager.miss_log is not None:
            self._manager.miss_log.record_plan(picks, now)
        if len(picks) == 1 and not (blocked or over_quota or fits):
            self._note_stuck(picks[0], capacity, plan)

    def _everything_fits(self, capacity: StepCapacity) -> bool:
        """Return whether there is nothing to gain from any order: O(1)."""
        if not (self._lookups.num_warm or self._num_sharing):
            return True
        unused = capacity.blocks - capacity.needed
        if not self._order.protects_needed:
            unused = self._pool.num_blank_blocks + self._tree.num_unhit
            unused = self._manager.units(unused)
        return self._uncached_blocks <= unused

    def _plan(
        self,
        capacity: StepCapacity,
        now: float,
        blocked: set[str],
        over_quota: set[str],
        fits: bool,
    ) -> list[PlannedAdmission]:
        """Return the requests to admit."""
        waiting = self._waiting
        self._taken.clear()
        state = QueueState(
            waiting.values(),
            self._waiting_tree,
            self._table,
            self._heap,
            self._turns,
            self._rate,
            self._size,
            self._lookups.num_warm,
            self._lookups.warm_blocks,
            self._lookups.last_sharer_before,
            self._idle_cached,
        )
        planner = self._planner
        if fits:
            planner = self._in_turn
        stands_back = None
        if over_quota:

            def stands_back(entry: WaitingRequest) -> bool:
                return entry.tenant in over_quota and self._within_bounds(entry, now)

        # Requests that are yet to be looked up are the youngest: they wait a step.
        unavailable = [waiting[i] for i in blocked if i in waiting]
        unavailable += self._new.values()
        return planner.plan(state, capacity, now, unavailable, stands_back)

    def _idle_cached(self, entry: WaitingRequest, take: bool) -> int:
        """Return the idle blocks of a request's cached prefix."""
        end = self._lookups.end_block(entry)
        if end is None:
            return 0
        return self._manager.units(self._tree.idle_on_path(end, self._taken, take))

    def _note_stuck(
        self, pick: PlannedAdmission, capacity: StepCapacity, plan: list[str]
    ) -> None:
        """Remember that the best request does not fit, until something changes."""
        entry = pick.entry
        self._taken.clear()
        need = entry.uncached + self._idle_cached(entry, False)
        oldest = next(iter(self._waiting.values()))
        if need > capacity.blocks:
            self._stuck = StuckPlan(
                plan, need, oldest.uncached, self._changes, self._rate.work
            )

    def _hold_behind_running(self, capacity: StepCapacity, now: float) -> set[str]:
        if not self._config.hold:
            return set()
        plans = self._manager.plans
        if plans is not None:
            return self._holds.behind_plans(plans, now)
        if not self._computing:
            return set()
        leaders = []
        for request in self._prefilling:
            leader = self._computing.get(request.request_id)
            if leader is not None:
                if request.status != _LOADING:
                    leader.cached = request.num_computed_tokens // self._size
                leaders.append((request, leader))
        return self._holds.behind_running(leaders, capacity, now)

    def _hold_behind_starting(
        self,
        picks: list[PlannedAdmission],
        held: set[str],
        blocked: set[str],
        capacity: StepCapacity,
        now: float,
    ) -> set[str]:
        plans = self._manager.plans
        if plans is not None and not (self._num_sharing or held):
            return set()
        planned = {pick.entry.id for pick in picks}

        def order() -> Iterator[WaitingRequest]:
            rest = (e for e in self._waiting.values() if e.id not in planned)
            for entry in chain((pick.entry for pick in picks), rest):
                if entry.id not in self._new:
                    yield entry

        if plans is not None:
            return self._holds.behind_points(
                order(), held, capacity, blocked, plans, now
            )
        return self._holds.behind_starting(order(), capacity, blocked, now)

    def _within_bounds(self, entry: WaitingRequest, now: float) -> bool:
        """Return whether a request has not reached the hard bounds on its turn."""
        since = self._turns.since(entry.arrival)
        if since is not None and now - since > self._config.max_extra_wait:
            return False
        return self._overtaken(entry) < self._config.max_overtakes

    def _may_be_held(self, entry: WaitingRequest, now: float) -> bool:
        """Return whether a request has not reached the hard bounds on being held."""
        if entry.held_for(now) > self._config.max_extra_wait:
            return False
        return self._overtaken(entry) < self._config.max_overtakes

    # -- after a step ----------------------------------------------------------

    def end_step(
        self, output: SchedulerOutput, loading: Iterable[Request], now: float
    ) -> None:
        """Note which requests were admitted.

        Args:
            output: of the step.
            loading: requests that hold blocks and wait for their KV.
            now: when it was scheduled.
        """
        self.queue.end_step()
        admitted = [new.req_id for new in output.scheduled_new_reqs]
        admitted += output.scheduled_cached_reqs.resumed_req_ids
        admitted += [request.request_id for request in loading]
        saved: list[int] = []
        prefilling, tally = None, self._pool.tally
        for request_id in admitted:
            if request_id not in self._waiting:
                continue
            if self._order.serve_oldest_every:
                free = (i for i in self._waiting if i not in self.blocked_this_step)
                self._planner.note_admitted(request_id == next(free, request_id))
            if prefilling is None:
                prefilling = {request.request_id for request in self._prefilling}
            entry = self._take(request_id, keep=request_id in prefilling)
            assert entry is not None
            pick = self._picks.get(request_id)
            older = self._table.num_older(entry.arrival)
            overtaken = self._turns.overtaken(entry.arrival, older, len(saved))
            reason = "turn" if pick is None else pick.reason
            tally.note_admission(reason, overtaken, entry.held_for(now))
            if request_id in prefilling:
                entry.computing = True
                self._computing[request_id] = entry
            saved.append(0 if pick is None else pick.tokens_saved)
            computed = entry.tokens - entry.cached * self._size
            self._tenants.charge(entry.tenant, computed)
        if saved:
            self._depart(now, len(saved))
        tokens = output.total_num_scheduled_tokens
        self._rate.observe_step(tokens, len(self._waiting), saved)
