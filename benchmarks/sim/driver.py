"""A run of requests through a model-free engine on a virtual clock.

Turns are sent at their time, or when the turn before them is answered and its delay
is over. Counts are facts: the scheduler is the real one. Seconds are the cost model's.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.engine import RequestMaker
from vllm_radix_bench.workloads.turn import Turn

_FIRST_ANSWER = 1 << 30
"""Generated tokens count up from here: none is like another, nor like a prompt's."""


class StalledError(CommandError, RuntimeError):
    """A scheduler schedules nothing while requests wait."""

    code = ExitCode.ENGINE


@dataclass
class Record:
    """What became of one request.

    Attributes:
        id: path of the turn: 3.0 is the first child of the fourth root.
        tenant: of the turn.
        prompt_tokens: of the whole prompt.
        cached_tokens: of it, found in the cache at the first admission.
        sent: seconds on the clock.
        first_token: seconds on the clock.
        finished: seconds on the clock.
        steps: engine steps from sending to the first token.
        overtaken: requests sent later and admitted before it.
        preemptions: of it.
    """

    id: str
    tenant: str
    prompt_tokens: int
    sent: float
    cached_tokens: int = 0
    first_token: float = 0.0
    finished: float = 0.0
    steps: int = 0
    overtaken: int = 0
    preemptions: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first_token - self.sent


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        records: of all requests, in the order in which they were sent.
        computed_prompt_tokens: all that was scheduled, but the steps that fed a
            generated token back: recomputation after a preemption counts.
        engine_steps: steps in which something was scheduled.
        seconds: on the clock, to the last answer.
        scheduler_cpu: seconds of CPU in the scheduler, of this machine.
    """

    records: list[Record] = field(default_factory=list)
    computed_prompt_tokens: int = 0
    engine_steps: int = 0
    seconds: float = 0.0
    scheduler_cpu: float = 0.0


@dataclass
class _Sent:
    turn: Turn
    prompt: list[int]
    record: Record
    answer: list[int] = field(default_factory=list)


class VirtualRun:
    """One run; see ``run``.

    Args:
        scheduler: fresh; its ``clock``, if it has one, is set to the run's.
        cost: of a step.
        answers: tokens that a request is answered with, by id; others are those of
            its turn, or made up.
        progress: called with the number of requests done since the last call.
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
        self._scheduler = scheduler
        self._cost = cost
        self._answers = answers or {}
        self._prefix = prefix
        self._progress = progress or (lambda done: None)
        self._maker = RequestMaker(scheduler)
        self._now = 0.0
        self._fresh = count(_FIRST_ANSWER)
        self._due: list[tuple[float, int, str, Turn, list[int]]] = []
        self._numbers = count()
        self._pending: dict[str, _Sent] = {}
        self._outcome = Outcome()
        self._admitted: list[Record] = []
        self._generated = 0
        self._scheduled = 0
        scheduler.clock = lambda: self._now

    def run(self, roots: Sequence[Turn]) -> Outcome:
        """Send all roots, and what follows, until everything is answered.

        Raises:
            StalledError: the scheduler stopped making progress.
        """
        for index, root in enumerate(roots):
            self._plan(root, [], f"{self._prefix}{index}")
        outcome, idle = self._outcome, 0
        while self._due or self._pending:
            if not self._pending:
                self._now = max(self._now, self._due[0][0])
            start = time.thread_time()
            while self._due and self._due[0][0] <= self._now:
                self._send(*heappop(self._due))
            output = self._scheduler.schedule()
            outcome.scheduler_cpu += time.thread_time() - start
            if output.total_num_scheduled_tokens:
                idle = 0
                outcome.engine_steps += 1
            else:
                # Two empty steps may follow a preemption or an abort.
                idle += 1
                if idle > 3:
                    if not self._due:
                        raise StalledError(
                            f"{len(self._pending)} requests wait and none is scheduled"
                        )
                    self._now = max(self._now, self._due[0][0])
            self._step(output)
        outcome.seconds = self._now
        outcome.computed_prompt_tokens = (
            self._scheduled - self._generated + len(outcome.records)
        )
        self._count_overtakes()
        return outcome

    def _plan(self, turn: Turn, before: list[int], path: str) -> None:
        when = max(turn.arrival, self._now + turn.delay)
        heappush(self._due, (when, next(self._numbers), path, turn, before))

    def _send(
        self, sent: float, number: int, path: str, turn: Turn, before: list[int]
    ) -> None:
        prompt = list(turn.tokens) if turn.whole else [*before, *turn.tokens]
        record = Record(path, turn.tenant, len(prompt), sent)
        record.steps = -self._outcome.engine_steps
        self._outcome.records.append(record)
        self._pending[path] = _Sent(turn, prompt, record)
        self._scheduler.add_request(
            self._maker.make(
                path,
                prompt,
                turn.max_tokens,
                arrival_time=sent,
                priority=turn.priority,
                cache_salt=turn.salt,
                extra_args={"tenant": turn.tenant} if turn.tenant else None,
            )
        )

    def _step(self, output: Any) -> None:
        scheduler = self._scheduler
        requests = scheduler.requests
        for new in output.scheduled_new_reqs:
            record = self._pending[new.req_id].record
            record.cached_tokens = new.num_computed_tokens
            self._admitted.append(record)
        ids: list[str] = []
        sampled: list[list[int]] = []
        sizes: list[tuple[int, int]] = []
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            end = request.num_computed_tokens
            sizes.append((tokens, end))
            ids.append(request_id)
            if end < request.num_tokens:
                sampled.append([])
                continue
            sent = self._pending[request_id]
            known = sent.turn.answer
            if known is None:
                known = self._answers.get(request_id)
            at = len(sent.answer)
            token = known[at] if known is not None else next(self._fresh)
            sent.answer.append(token)
            sampled.append([token])
        if sizes:
            self._now += self._cost.seconds(sizes)
        self._scheduled += output.total_num_scheduled_tokens
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )
        preemptions = {
            request_id: requests[request_id].num_preemptions for request_id in ids
        }
        start = time.thread_time()
        outputs = scheduler.update_from_output(output, result)
        self._outcome.scheduler_cpu += time.thread_time() - start
        done = 0
        for batch in outputs.values():
            for one in batch.outputs:
                sent = self._pending[one.request_id]
                record = sent.record
                if not record.first_token and one.new_token_ids:
                    record.first_token = self._now
                    record.steps += self._outcome.engine_steps
                if one.finish_reason is None:
                    continue
                del self._pending[one.request_id]
                record.finished = self._now
                record.preemptions = preemptions[one.request_id]
                self._generated += len(sent.answer)
                done += 1
                path = sent.prompt + sent.answer
                for index, child in enumerate(sent.turn.children):
                    self._plan(child, path, f"{one.request_id}.{index}")
        if done:
            self._progress(done)

    def _count_overtakes(self) -> None:
        """Count for each request those sent later and admitted before: n log n."""
        number = {id(record): i for i, record in enumerate(self._outcome.records)}
        before: list[int] = []
        for record in self._admitted:
            mine = number[id(record)]
            record.overtaken = len(before) - bisect_left(before, mine)
            insort(before, mine)
