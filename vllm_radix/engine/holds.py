"""Requests that wait for another one to compute what they share with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from vllm_radix.engine.compat import Request, RequestStatus
from vllm_radix.engine.resume_plans import ResumePlans
from vllm_radix.policy import StepCapacity, WaitingRequest, WaitingTree

_MOST_LATE = 8
"""How often a request is held behind others that start: one for each junction."""

_LOADING = RequestStatus.WAITING_FOR_REMOTE_KVS


class Holds:
    """Holds requests back while another computes, in chunks, what they share.

    A request is held no longer than the hard bounds on waiting allow, however long a
    prefill or a load takes.

    Args:
        tree: the requests that wait, and those that compute in chunks.
        waiting: the requests that wait, by id.
        may_wait: returns whether a request is within its hard bounds at a time.
        block_size: tokens in a block.

    Attributes:
        held: ids of the requests that are held in this step.
    """

    def __init__(
        self,
        tree: WaitingTree,
        waiting: Mapping[str, WaitingRequest],
        may_wait: Callable[[WaitingRequest, float], bool],
        block_size: int,
    ) -> None:
        self._tree = tree
        self._waiting = waiting
        self._may_wait = may_wait
        self._size = block_size
        self.held: set[str] = set()

    def _hold(self, entry: WaitingRequest, now: float) -> bool:
        """Hold a request, unless it has reached a hard bound."""
        if not self._may_wait(entry, now):
            return False
        if entry.held_since is None:
            entry.held_since = now
        return True

    def behind_running(
        self,
        leaders: Iterable[tuple[Request, WaitingRequest]],
        capacity: StepCapacity,
        now: float,
    ) -> set[str]:
        """Return the requests to hold because a running one computes their prefix.

        Args:
            leaders: requests that compute their prompts in chunks, or load them.
            capacity: what the step can admit.
            now: the time, in seconds.
        """
        held: set[str] = set()
        for request, leader in leaders:
            published = leader.cached
            if request.status != _LOADING:
                # It goes on before a request is admitted in this step.
                chunk = capacity.chunk or capacity.tokens
                published = (request.num_computed_tokens + chunk) // self._size
            for entry in self._tree.uncached_sharers(leader, published):
                if entry.id in self._waiting and self._hold(entry, now):
                    held.add(entry.id)
        return held

    def behind_starting(
        self,
        order: Iterable[WaitingRequest],
        capacity: StepCapacity,
        unavailable: set[str],
        now: float,
    ) -> set[str]:
        """Return the requests to hold because one that starts will compute on.

        O(slots), and those returned.

        Args:
            order: requests, as they are to be admitted.
            capacity: what the step can admit; it has a ``chunk``.
            unavailable: ids of requests that cannot go.
            now: the time, in seconds.
        """

        def sharers(leader: WaitingRequest) -> Iterable[WaitingRequest]:
            done = leader.cached * self._size + capacity.chunk
            if done >= leader.tokens:
                return ()
            return self._tree.uncached_sharers(leader, done // self._size)

        return self._behind_leaders(order, capacity.slots, unavailable, sharers, now)

    def _behind_leaders(
        self,
        order: Iterable[WaitingRequest],
        slots: int,
        unavailable: set[str],
        sharers: Callable[[WaitingRequest], Iterable[WaitingRequest]],
        now: float,
    ) -> set[str]:
        """Return the requests to hold behind those that start.

        Args:
            order: requests, as they are to be admitted.
            slots: how many can be.
            unavailable: ids of requests that cannot go.
            sharers: returns those that had better wait for one that starts.
            now: the time, in seconds.
        """
        late: set[str] = set()
        admitted: set[str] = set()
        for leader in order:
            if len(admitted) == slots:
                break
            if leader.id in late or leader.id in unavailable:
                continue
            admitted.add(leader.id)
            for entry in sharers(leader):
                free = entry.id in self._waiting and entry.id not in admitted
                if free and entry.id not in late and self._hold(entry, now):
                    late.add(entry.id)
        return late

    def behind_plans(self, plans: ResumePlans, now: float) -> set[str]:
        """Return the requests to hold until they can go on where one leaves a point.

        O(open junctions log n), and those returned.

        Args:
            plans: of the requests that run.
            now: the time, in seconds.
        """
        held: set[str] = set()
        for place, key, namespace in plans.open_junctions():
            for entry in self._tree.under(key, namespace):
                waits = entry.id in self._waiting and entry.cached < place
                if waits and entry.id not in held and self._hold(entry, now):
                    held.add(entry.id)
        return held

    def behind_points(
        self,
        order: Iterable[WaitingRequest],
        held: set[str],
        capacity: StepCapacity,
        unavailable: set[str],
        plans: ResumePlans,
        now: float,
    ) -> set[str]:
        """Return the requests to hold behind those that start, and behind those held.

        Args:
            order: requests, as they are to be admitted.
            held: ids of those that are held in this step already.
            capacity: what the step can admit.
            unavailable: ids of requests that cannot go.
            plans: of the requests that run.
            now: the time, in seconds.
        """
        late = self.behind_junctions(order, capacity.slots, unavailable, plans, now)
        if held or late:
            late |= self.leave_room(held | late, capacity, plans.dense, now)
        return late

    def behind_junctions(
        self,
        order: Iterable[WaitingRequest],
        slots: int,
        unavailable: set[str],
        plans: ResumePlans,
        now: float,
    ) -> set[str]:
        """Return the requests to hold because one that starts shares more with them.

        It leaves a resume point there, which others can use in later steps only. After
        a few times a request is not held so again: the one that starts may leave no
        point after all. O(slots, and those that share more with them).

        Args:
            order: requests, as they are to be admitted.
            slots: how many can be.
            unavailable: ids of requests that cannot go.
            plans: say where such points lie, and what is worth one.
            now: the time, in seconds.
        """

        def sharers(leader: WaitingRequest) -> Iterator[WaitingRequest]:
            least = leader.cached + plans.min_gap
            for entry, shared in self._tree.sharing_at_least(leader, least):
                enough = max(least, entry.cached + plans.min_gap)
                if plans.place(shared) >= enough and entry.times_late < _MOST_LATE:
                    yield entry

        late = self._behind_leaders(order, slots, unavailable, sharers, now)
        for request_id in late:
            self._waiting[request_id].times_late += 1
        return late

    def leave_room(
        self,
        held: set[str],
        capacity: StepCapacity,
        dense: bool,
        now: float,
    ) -> set[str]:
        """Return the requests to hold so that those held before them still fit.

        A request that waits a few steps for a resume point must not lose its memory,
        and the point, to one that came later and has nothing cached. O(waiting
        requests).

        Args:
            held: ids of the requests that are held in this step.
            capacity: what the step can admit.
            dense: whether a request needs less memory for what is cached of it;
                states are each request's own.
            now: the time, in seconds.
        """
        room = capacity.blocks - capacity.needed
        slots, behind = capacity.slots, False
        late: set[str] = set()
        for entry in self._waiting.values():
            needed = entry.uncached if dense else entry.blocks
            if entry.id in held:
                behind = True
                needed = entry.own_uncached if dense else entry.blocks
            elif behind and not entry.cached:
                short = needed > room or slots <= 0
                if short and self._hold(entry, now):
                    late.add(entry.id)
                    continue
            room -= needed
            slots -= 1
        return late

    def settle(self, held: set[str], now: float) -> None:
        """Release the requests that are not held any more.

        Args:
            held: ids of those that are held in this step.
            now: the time, in seconds.
        """
        for request_id in self.held - held:
            entry = self._waiting.get(request_id)
            if entry is not None and entry.held_since is not None:
                entry.held_before += now - entry.held_since
                entry.held_since = None
        self.held = held
