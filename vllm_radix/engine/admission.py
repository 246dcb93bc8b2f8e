"""The order in which vLLM sees the waiting requests, decided before each step.

Keeps the tree of waiting requests beside vLLM's queue: each is looked up in the
cache once, and again only when the tree's news concern it. When a step can admit
anybody, the queue is put in order, requests whose shared prefix is being computed
are held back, and what the queue will need is pinned.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, islice

from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import (
    FCFSRequestQueue,
    Request,
    RequestStatus,
    SchedulerOutput,
)
from vllm_radix.engine.explain import Placement
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.policy import (
    ORDERS,
    STEP,
    Backlog,
    Bounds,
    Deficits,
    FirstCome,
    Pace,
    Pick,
    Planner,
    Room,
    Turns,
    View,
    Waiting,
    unique_uncached,
    view_of,
)
from vllm_radix.tree import News

_BLOCKED = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
_LOADING = RequestStatus.WAITING_FOR_REMOTE_KVS
_GOOD_FOR = 16 * STEP
"""Work after which an order is made again, though nothing but time has changed."""

_MOST_NEWS = 10_000

_HORIZON = 256
"""Requests whose prefixes are pinned at most."""


class Admission:
    """Orders a first-come queue of vLLM's.

    Args:
        manager: of the cache.
        config: options.
        computing: requests that are computing their prompts in chunks, or loading
            them; vLLM's own set.

    Attributes:
        passed_over: requests that cannot go in this step, whatever the order.
    """

    def __init__(
        self,
        manager: RadixKVCacheManager,
        config: RadixConfig,
        computing: set[Request],
    ) -> None:
        self._manager = manager
        self._pool = manager.block_pool
        self._tree = manager.block_pool.tree
        self._tree.news = News()
        self._size = self._pool.hash_block_size
        self._config = config
        self._prefilling = computing
        self._backlog = Backlog(self._tree.block_bytes)
        # All who wait, in order of arrival; filed ones are in the backlog, and by
        # the block their cached prefix ends with and the tokens that come next.
        self._waiting: dict[str, Waiting] = {}
        self._unfiled: dict[str, None] = {}
        self._ends: dict[Hashable, dict[bytes, set[str]]] = {}
        self._end_of: dict[str, tuple[Hashable, bytes]] = {}
        self._computing: dict[str, Waiting] = {}
        self._num_warm = 0
        self._arrivals = 0
        self._order = ORDERS[config.policy]()
        bounds = Bounds(config.max_overtakes, config.max_extra_wait, config.patience)
        self._planner = Planner(self._order, bounds, self._pool.num_gpu_blocks)
        self._deficits = Deficits(config.fair_quantum) if config.tenant else None
        self._pace = Pace()
        self._turns = Turns()
        # While nothing is to be gained but fairness is asked for.
        self._in_turn = Planner(FirstCome(), bounds, self._pool.num_gpu_blocks)
        self._saved: dict[str, int] = {}
        self._pinned = False
        self._held: set[str] = set()
        self._in_order = True
        self._arranged_at: object = None
        self.passed_over: set[str] = set()

    def __len__(self) -> int:
        """Return how many requests are known: waiting, or computing in chunks."""
        return len(self._waiting) + len(self._computing)

    def __bool__(self) -> bool:
        return True

    def overtaken(self, request_id: str) -> int | None:
        """Return by how many later ones a waiting request was overtaken: O(n).

        None if it does not wait.
        """
        for older, entry in enumerate(self._waiting.values()):
            if entry.id == request_id:
                return self._turns.overtaken(entry.arrival, older)
        return None

    def check(self) -> None:
        """Verify that all that is kept of the requests agrees, O(everything).

        Raises:
            AssertionError: it does not.
        """
        self._backlog.check()
        filed = {entry.id for entry in self._backlog.entries}
        computing = set(self._computing)
        assert filed == computing | self._end_of.keys(), "filed where nobody is"
        assert not computing & self._waiting.keys(), "computes and waits"
        assert self._end_of.keys() <= self._waiting.keys(), "filed, and does not wait"
        unfiled = self._waiting.keys() - self._end_of.keys()
        assert unfiled == self._unfiled.keys(), "waits, and is not to be filed"
        arrivals = [entry.arrival for entry in self._waiting.values()]
        assert arrivals == sorted(arrivals), "not in order of arrival"
        listed = {
            request_id: (end, following)
            for end, here in self._ends.items()
            for following, ids in here.items()
            for request_id in ids
        }
        assert listed == self._end_of, "not listed where filed"
        warm = sum(self._waiting[i].cached > 0 for i in self._end_of)
        assert warm == self._num_warm, "warm requests are miscounted"
        if not self._tree.news:
            for request_id in self._end_of:
                entry = self._waiting[request_id]
                probe = self._tree.probe(entry.key, entry.namespace)
                assert entry.cached == (probe.num_blocks if probe else 0), "old news"

    # -- who waits -------------------------------------------------------------

    def add(self, request: Request, now: float) -> Waiting:
        """Note a request that waits, after all that are noted."""
        # Its KV was loaded in vain, and it waits again.
        before = self._computing.pop(request.request_id, None)
        if before is not None:
            self._backlog.remove(before)
        keys = self._pool.keys
        # At least one token is computed, for its logits.
        whole = (request.num_tokens - 1) // self._size
        if not self._manager.prefix_cache_lookup_enabled(request):
            whole = 0
        key = keys.key(request, whole * self._size) if whole else b""
        entry = Waiting(
            request.request_id,
            self._arrivals,
            now,
            self._pace.work,
            key[: whole * self._tree.block_bytes],
            keys.namespace(request),
            request.num_tokens,
            -(-request.num_tokens // self._size),
            tenant=self._tenant(request),
        )
        self._arrivals += 1
        self._waiting[entry.id] = entry
        self._unfiled[entry.id] = None
        return entry

    def forget(self) -> None:
        """Forget what was learned, but not who waits: as after a start."""
        work = self._pace.work
        self._pace = Pace()
        self._pace.work = work
        self._planner.overtaking = 0

    def remove(self, request: Request, now: float) -> None:
        """Forget a request that ended, if it is known."""
        request_id = request.request_id
        if request_id in self._computing:
            self._backlog.remove(self._computing.pop(request_id))
        elif self._take(request_id) is not None:
            self._depart(now, 1)
        if self._deficits is not None:
            self._deficits.charge(self._tenant(request), request.num_output_tokens)

    def _take(self, request_id: str, keep: bool = False) -> Waiting | None:
        """Take a request off the queue; ``keep`` it in the backlog."""
        entry = self._waiting.pop(request_id, None)
        self._unfiled.pop(request_id, None)
        if entry is None:
            return None
        filed = self._unfile(entry)
        if keep and not filed:
            self._backlog.add(entry)
        elif filed and not keep:
            self._backlog.remove(entry)
        return entry

    def _unfile(self, entry: Waiting) -> bool:
        """Stop listening for one; return whether it was filed."""
        end = self._end_of.pop(entry.id, None)
        if end is None:
            return False
        self._num_warm -= entry.cached > 0
        before, following = end
        here = self._ends[before]
        here[following].discard(entry.id)
        if not here[following]:
            del here[following]
            if not here:
                del self._ends[before]
        return True

    def _tenant(self, request: Request) -> str:
        name = self._config.tenant
        if not name:
            return ""
        if name == "cache_salt":
            return request.cache_salt or ""
        params = request.sampling_params or request.pooling_params
        return str((getattr(params, "extra_args", None) or {}).get(name, ""))

    def _depart(self, now: float, count: int) -> None:
        oldest = next(iter(self._waiting.values()), None)
        arrival = oldest.arrival if oldest is not None else self._arrivals
        self._turns.depart(now, count, arrival)

    # -- what of them is cached ------------------------------------------------

    def _look_up(self, entry: Waiting) -> None:
        """Look up the cached prefix of one, and file it where that ends."""
        entry.probe = self._tree.probe(entry.key, entry.namespace, None, entry.probe)
        entry.cached = entry.probe.num_blocks if entry.probe else 0
        self._num_warm += entry.cached > 0
        last = entry.probe.last_block if entry.probe else None
        end = News.root(entry.namespace) if last is None else last
        at = entry.cached * self._tree.block_bytes
        following = entry.key[at : at + self._tree.block_bytes]
        self._ends.setdefault(end, {}).setdefault(following, set()).add(entry.id)
        self._end_of[entry.id] = end, following

    def _catch_up(self) -> None:
        """File who is new, and look up again whom the tree's news concern.

        O(the news, and those concerned).
        """
        news = self._tree.news
        assert news is not None
        if self._end_of and news:
            if news.reshaped:
                concerned = set(self._end_of)
            else:
                concerned = set()
                for block in news.gone:
                    for ids in self._ends.get(block, {}).values():
                        concerned |= ids
                for before, following in news.grown:
                    concerned |= self._ends.get(before, {}).get(following, set())
            for request_id in concerned:
                entry = self._waiting[request_id]
                self._unfile(entry)
                self._look_up(entry)
        news.clear()
        for request_id in self._unfiled:
            new = self._waiting[request_id]
            self._backlog.add(new)
            self._look_up(new)
        self._unfiled.clear()

    # -- before a step ---------------------------------------------------------

    def start_step(self) -> None:
        """Note that a step is about to be scheduled."""
        self.passed_over = set()
        if self._computing:
            ids = {request.request_id for request in self._prefilling}
            for request_id in [i for i in self._computing if i not in ids]:
                self._backlog.remove(self._computing.pop(request_id))
        news = self._tree.news
        assert news is not None
        if not self._waiting:
            if news:
                news.clear()
            self._pin(())
        elif len(news.gone) + len(news.grown) > _MOST_NEWS:
            # Nobody could be admitted for long: cheaper to look up all again.
            news.clear()
            news.reshaped = True

    def arrange(self, queue: FCFSRequestQueue, room: Room, now: float) -> list[Request]:
        """Put vLLM's queue in order: O(n log n), and O(1) if nothing can be gained.

        Args:
            queue: vLLM's waiting requests.
            room: what the step can admit.
            now: the time, in seconds.

        Returns:
            Requests that were taken out of the queue, because another one is
            computing what they share with it. They wait behind the others.
        """
        # An order that was made is good until something changes.
        if self._state(queue, room) == self._arranged_at:
            return []
        first, movable = _split(queue)
        if not movable.keys() <= self._waiting.keys():
            for request_id, request in movable.items():
                if request_id not in self._waiting:
                    self.add(request, now)
        self._catch_up()
        related = self._num_warm or self._backlog.num_related or self._deficits
        if not related and self._in_order:
            return []
        for request in self._prefilling if self._computing else ():
            leader = self._computing.get(request.request_id)
            if leader is not None and request.status != _LOADING:
                leader.cached = request.num_computed_tokens // self._size
        view = view_of(self._backlog, self._pace.work, self._size)
        guess = float(view.uncached.mean()) if len(self._backlog) else 0.0
        self._pace.watch(len(queue), guess)
        view.pace = self._pace.each
        unused = self._pool.num_blank_blocks + self._tree.num_tails
        pressed = unique_uncached(view) > unused
        held = self._hold(movable, room, now)
        waits_for_grammar = [
            request_id
            for request_id, request in movable.items()
            if request.status is _BLOCKED and not _grammar_is_ready(request)
        ]
        self.passed_over = held.union(waits_for_grammar)
        entries = self._backlog.entries
        if self.passed_over or len(movable) < len(self._waiting):
            for at, entry in enumerate(entries):
                if entry.id not in movable or entry.id in self.passed_over:
                    view.left[at] = False
        picks: list[Pick] = []
        if pressed or self._deficits is not None:
            planner = self._planner if pressed else self._in_turn
            barred = self._barred(view, now)
            self.passed_over |= {entries[at].id for at in barred}
            picks = planner.plan(view, room, self._turns, now, self._pace.limit, barred)
        self._saved = {entries[pick.place].id: pick.saved for pick in picks}
        self._explain(picks, now)
        picked = [entries[pick.place].id for pick in picks]
        self._pin(self._needed(picked, planner.ranked) if pressed else ())
        chosen = set(picked)
        # In order of arrival, as they were put in.
        late = chosen | held if held else chosen
        order = picked + [i for i in self._waiting if i not in late and i in movable]
        if room.chunk and self._config.hold:
            late = self._hold_behind(order, movable, room, now)
            held |= late
            self.passed_over |= late
            order = [i for i in order if i not in late]
        self._let_go(held, now)
        queue.clear()
        queue.extend(first)
        queue.extend([movable[i] for i in order])
        self._in_order = not picked and not held
        # Who is held, or waits for a grammar, may be free in the next step.
        self._arranged_at = None if self.passed_over else self._state(queue, room)
        return [movable[i] for i in self._waiting if i in held] if held else []

    def _state(self, queue: FCFSRequestQueue, room: Room) -> object:
        """Return what an order depends on: cache, room, who waits; and a while."""
        unused = self._pool.num_blank_blocks + self._tree.num_tails
        ends = queue[0].request_id, queue[-1].request_id
        period = self._pace.work // _GOOD_FOR
        return self._tree.version, unused, room, len(queue), *ends, period

    def skip_step(self, now: float) -> None:
        """Note that nobody can be admitted: no one waits for another now."""
        if self._held:
            self._let_go(set(), now)

    def _hold(self, movable: dict[str, Request], room: Room, now: float) -> set[str]:
        """Return who waits for blocks that another request is computing.

        Nobody is held for longer than ``max_extra_wait``, however long a prefill
        or a load takes.
        """
        held: set[str] = set()
        if self._computing and self._config.hold:
            for request in self._prefilling:
                leader = self._computing.get(request.request_id)
                if leader is None:
                    continue
                published = leader.cached
                if request.status != _LOADING:
                    # It goes on before anybody is admitted in this step.
                    done = request.num_computed_tokens + (room.chunk or room.tokens)
                    published = done // self._size
                for entry in self._backlog.waiting_for(leader, published):
                    if entry.id in movable and self._may_hold(entry, now):
                        held.add(entry.id)
        return held

    def _let_go(self, held: set[str], now: float) -> None:
        """Note who is not held any more."""
        for request_id in self._held - held:
            entry = self._waiting.get(request_id)
            if entry is not None and entry.held is not None:
                entry.held_for += now - entry.held
                entry.held = None
        self._held = held

    def _hold_behind(
        self, order: list[str], movable: dict[str, Request], room: Room, now: float
    ) -> set[str]:
        """Return who shares with one that starts in this step, and will not end in it.

        O(slots), and those returned.

        Args:
            order: ids, as they are to be admitted.
            movable: those that may be held, and others.
            room: what the step can admit.
            now: the time, in seconds.
        """
        late: set[str] = set()
        admitted: set[str] = set()
        for request_id in order:
            if len(admitted) == room.slots:
                break
            if request_id in late or request_id in self.passed_over:
                continue
            admitted.add(request_id)
            leader = self._waiting[request_id]
            done = leader.cached * self._size + room.chunk
            if done >= leader.tokens:
                continue
            for entry in self._backlog.waiting_for(leader, done // self._size):
                free = entry.id in movable and entry.id not in admitted
                if free and self._may_hold(entry, now):
                    late.add(entry.id)
        return late

    def _may_hold(self, entry: Waiting, now: float) -> bool:
        """Note that a request is held, unless it has reached a hard bound."""
        if self._turns.overtaken(entry.arrival, 0) >= self._config.max_overtakes:
            return False
        since = now if entry.held is None else entry.held
        if entry.held_for + now - since > self._config.max_extra_wait:
            return False
        entry.held = since
        return True

    def _barred(self, view: View, now: float) -> list[int]:
        """Return the places of tenants who stand back for the others.

        Whoever is past a hard bound does not.
        """
        if self._deficits is None:
            return []
        entries = self._backlog.entries
        free = [int(at) for at in view.left.nonzero()[0]]
        tenants = self._deficits.barred(entries[at].tenant for at in free)
        if not tenants:
            return []
        barred = []
        waiting = [int(at) for at in view.waits.nonzero()[0]]
        waiting.sort(key=lambda at: entries[at].arrival)
        for older, at in enumerate(waiting):
            entry = entries[at]
            if view.left[at] and entry.tenant in tenants:
                since = self._turns.since(entry.arrival)
                late = since is not None and now - since > self._config.max_extra_wait
                overtaken = self._turns.overtaken(entry.arrival, older)
                if not late and overtaken < self._config.max_overtakes:
                    barred.append(at)
        return barred

    def _needed(self, picked: list[str], ranked: Iterable[int]) -> list[int]:
        """Return the blocks that end what the queue needs next, nearest first."""
        quota = int(self._config.pin_quota * self._pool.num_gpu_blocks)
        entries = self._backlog.entries
        needed: dict[int, None] = {}
        rest = (entries[at].id for at in islice(ranked, _HORIZON))
        for request_id in chain(picked, rest):
            entry = self._waiting.get(request_id)
            if entry is None or not entry.cached:
                continue
            last, _ = self._end_of[request_id]
            if not isinstance(last, int) or last in needed:
                continue
            quota -= entry.cached
            if quota < 0:
                break
            needed[last] = None
        return list(needed)

    def _pin(self, blocks: Sequence[int]) -> None:
        if blocks or self._pinned:
            self._tree.pin(blocks)
            self._pinned = bool(blocks)

    def _explain(self, picks: list[Pick], now: float) -> None:
        """Write down why each was placed where it is, for who asks."""
        explainer = self._manager.explainer
        if explainer is None:
            return
        explainer.placements.clear()
        for pick in picks:
            entry = self._backlog.entries[pick.place]
            since = now if entry.held is None else entry.held
            held = entry.held_for + now - since
            explainer.placements[entry.id] = Placement(
                pick.why, entry.arrival, entry.since, held
            )

    # -- after a step ----------------------------------------------------------

    def end_step(
        self, output: SchedulerOutput, loading: Iterable[Request], now: float
    ) -> None:
        """Note who was admitted.

        Args:
            output: of the step.
            loading: requests that hold blocks and wait for their KV.
            now: when it was scheduled.
        """
        gone = [new.req_id for new in output.scheduled_new_reqs]
        gone += output.scheduled_cached_reqs.resumed_req_ids
        gone += [request.request_id for request in loading]
        saved: list[int] = []
        prefilling = None
        for request_id in gone:
            if request_id not in self._waiting:
                continue
            free = (i for i in self._waiting if i not in self.passed_over)
            oldest = next(free, request_id)
            self._planner.admitted(request_id == oldest)
            if prefilling is None:
                prefilling = {request.request_id for request in self._prefilling}
            entry = self._take(request_id, keep=request_id in prefilling)
            if entry is None:
                continue
            if request_id in prefilling:
                entry.computing = True
                self._computing[request_id] = entry
            saved.append(self._saved.get(request_id, 0))
            if self._deficits is not None:
                computed = entry.tokens - entry.cached * self._size
                self._deficits.charge(entry.tenant, computed)
        if saved:
            self._depart(now, len(saved))
        self._pace.note(output.total_num_scheduled_tokens, len(self._waiting), saved)


def _split(
    queue: FCFSRequestQueue,
) -> tuple[list[Request], dict[str, Request]]:
    """Return whom vLLM put where they are to stay, and the others by id: O(n).

    Preempted requests, those that hold blocks, and sessions keep the head.
    """
    first: list[Request] = []
    movable: dict[str, Request] = {}
    fresh = RequestStatus.WAITING
    for request in queue:
        status = request.status
        if request.num_computed_tokens or not (status is fresh or status is _BLOCKED):
            first.append(request)
        else:
            movable[request.request_id] = request
    return first, movable


def _grammar_is_ready(request: Request) -> bool:
    """Whether a request that waited for its grammar need not any more."""
    structured = request.structured_output_request
    return structured is not None and structured.grammar is not None
