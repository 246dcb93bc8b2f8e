"""A run of requests through model-free engines on a virtual clock.

Turns are sent at their time, or when the turn before them is answered and its delay
is over: to the one engine there is, or to that which a routing rule chooses. Counts are
facts: the schedulers are the real ones. Seconds are the cost model's.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.routing.base import EngineLoad, Routing
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.virtual_engine import Outcome, Record, VirtualEngine
from vllm_radix_bench.workloads.turn import Turn

_FIRST_ANSWER = 1 << 30
"""Generated tokens count up from here: none is like another, nor like a prompt's."""


class StalledError(CommandError, RuntimeError):
    """A scheduler schedules nothing while requests wait."""

    code = ExitCode.ENGINE


@dataclass
class FleetOutcome(Outcome):
    """What a run with a routing rule did: the sums of its engines.

    Attributes:
        engines: what each engine did.
        routing_cpu: seconds of CPU in the routing rule, of this machine.
    """

    engines: list[Outcome] = field(default_factory=list)
    routing_cpu: float = 0.0


class _Events:
    """Takes what a scheduler publishes of its cache, for a routing rule."""

    def __init__(self, engine: int, routing: Routing) -> None:
        self._engine, self._routing = engine, routing

    def publish(self, batch: Any) -> None:
        """Pass the events of a step on."""
        self._routing.note_events(self._engine, batch.events)

    def shutdown(self) -> None:
        """Do nothing: no connection is open."""


class FleetRun:
    """One run through several engines; see ``run``.

    At one time steps end first, then requests are routed, then steps begin: a rule
    knows what engines told at the end of their last steps.

    Args:
        schedulers: fresh, one for each engine; each ``clock`` is set to its engine's.
        cost: of a step.
        routing: chooses the engine of a request; None sends all to the first.
        answers: tokens that a request is answered with, by id; others are those of
            its turn, or made up.
        progress: called with the number of requests done since the last call.
        prefix: of the requests' ids.
    """

    def __init__(
        self,
        schedulers: Sequence[Any],
        cost: CostModel,
        routing: Routing | None,
        answers: Mapping[str, Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
        prefix: str = "",
    ) -> None:
        fresh = count(_FIRST_ANSWER)
        self._schedulers = schedulers
        self._engines = [
            VirtualEngine(scheduler, cost, answers or {}, fresh, number)
            for number, scheduler in enumerate(schedulers)
        ]
        self._routing = routing
        self._loads = [EngineLoad() for _ in schedulers]
        self._observed = 0
        self._routing_cpu = 0.0
        self._prefix = prefix
        self._progress = progress or (lambda done: None)
        self._records: list[Record] = []
        self._due: list[tuple[float, int, str, Turn, list[int]]] = []
        self._numbers = count()
        if routing is not None and routing.wants_events:
            for number, scheduler in enumerate(schedulers):
                scheduler.kv_event_publisher = _Events(number, routing)

    def run(self, roots: Sequence[Turn]) -> FleetOutcome:
        """Send all roots, and what follows, until everything is answered.

        Raises:
            StalledError: a scheduler stopped making progress.
        """
        for index, root in enumerate(roots):
            self._plan(root, [], f"{self._prefix}{index}", 0.0)
        engines = self._engines
        while True:
            times = [one.ends for one in engines if one.ends is not None]
            if self._due:
                times.append(self._due[0][0])
            if not times:
                break
            # A clock never goes back: that of a turn that waited for its parent.
            now = min(times)
            self._observe(now)
            for number, engine in enumerate(engines):
                if engine.ends is not None and engine.ends <= now:
                    self._end_step(number, engine)
            while self._due and self._due[0][0] <= now:
                self._send(*heappop(self._due))
            for engine in engines:
                if engine.may_begin:
                    engine.begin_step(max(now, engine.now))
        if waiting := sum(engine.unanswered for engine in engines):
            raise StalledError(f"{waiting} requests wait and none is scheduled")
        return self._outcome([engine.close() for engine in engines])

    def _outcome(self, engines: list[Outcome]) -> FleetOutcome:
        return FleetOutcome(
            self._records,
            sum(one.computed_prompt_tokens for one in engines),
            sum(one.engine_steps for one in engines),
            max(one.seconds for one in engines),
            sum(one.scheduler_cpu for one in engines),
            engines,
            self._routing_cpu,
        )

    def _plan(self, turn: Turn, before: list[int], path: str, now: float) -> None:
        when = max(turn.arrival, now + turn.delay)
        heappush(self._due, (when, next(self._numbers), path, turn, before))

    def _observe(self, now: float) -> None:
        """Let the rule look at loads if its time has come since the last event.

        Between two events nothing changes: what it sees is as it was at that time.
        """
        if self._routing is None or not (every := self._routing.observe_every):
            return
        number = math.floor(now / every)
        if number > self._observed:
            self._observed = number
            self._routing.observe(self._loads)

    def _send(
        self, sent: float, number: int, path: str, turn: Turn, before: list[int]
    ) -> None:
        prompt = list(turn.tokens) if turn.whole else [*before, *turn.tokens]
        chosen = 0
        if self._routing is not None:
            start = time.thread_time()
            chosen = self._routing.choose(prompt, turn.salt, self._loads)
            self._routing_cpu += time.thread_time() - start
        self._loads[chosen].in_flight += 1
        self._records.append(self._engines[chosen].send(sent, path, turn, prompt))

    def _end_step(self, number: int, engine: VirtualEngine) -> None:
        done = engine.end_step()
        load = self._loads[number]
        if self._routing is not None and self._routing.observe_every:
            scheduler = self._schedulers[number]
            load.running, load.waiting = scheduler.get_request_counts()
            load.kv_usage = scheduler.get_kv_cache_usage()
        load.in_flight -= len(done)
        for name, turn, path in done:
            for index, child in enumerate(turn.children):
                self._plan(child, path, f"{name}.{index}", engine.now)
        if done:
            self._progress(len(done))


class VirtualRun:
    """One run through one engine; see ``run``.

    Args:
        scheduler: fresh, or without requests; its ``clock`` is set to the run's.
        cost: of a step.
        answers: as of ``FleetRun``.
        progress: as of ``FleetRun``.
        prefix: of the requests' ids.
    """

    def __init__(
        self,
        scheduler: Any,
        cost: CostModel,
        answers: Mapping[str, Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
        prefix: str = "",
    ) -> None:
        self._run = FleetRun([scheduler], cost, None, answers, progress, prefix)

    def run(self, roots: Sequence[Turn]) -> Outcome:
        """Send all roots, and what follows, until everything is answered.

        Raises:
            StalledError: the scheduler stopped making progress.
        """
        (outcome,) = self._run.run(roots).engines
        return outcome
