"""An engine without a model, on a clock of its own: a scheduler, step by step.

A step begins when the scheduler schedules, takes what the cost model says, and ends
when the scheduler gets its results. What is sent meanwhile waits for the next step.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.v1.outputs import ModelRunnerOutput

from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.engine import RequestMaker
from vllm_radix_bench.workloads.turn import Turn

_EMPTY_STEPS = 3
"""So many steps without anything scheduled may follow a preemption or an abort."""


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
        overtaken: requests sent later to its engine and admitted before it.
        preemptions: of it.
        engine: number of the engine that served it.
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
    engine: int = 0

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


class Answered(NamedTuple):
    """A request that has its answer: its id, its turn, and prompt and answer."""

    id: str
    turn: Turn
    path: list[int]


@dataclass
class _Sent:
    turn: Turn
    prompt: list[int]
    record: Record
    answer: list[int] = field(default_factory=list)


class VirtualEngine:
    """A scheduler, its clock, and the requests that were sent to it.

    Args:
        scheduler: fresh, or without requests; its ``clock`` is set to the engine's.
        cost: of a step.
        answers: tokens that a request is answered with, by id; others are those of
            its turn, or made up.
        fresh: tokens to make answers of.
        number: of the engine.

    Attributes:
        now: seconds on the clock.
        ends: when the step that has begun ends; None between steps.
        outcome: what it did so far.
    """

    def __init__(
        self,
        scheduler: Any,
        cost: CostModel,
        answers: Mapping[str, Sequence[int]],
        fresh: Iterator[int],
        number: int = 0,
    ) -> None:
        self.now = 0.0
        self.ends: float | None = None
        self.outcome = Outcome()
        self._scheduler = scheduler
        self._cost = cost
        self._answers = answers
        self._fresh = fresh
        self._number = number
        self._maker = RequestMaker(scheduler)
        self._inbox: list[_Sent] = []
        self._pending: dict[str, _Sent] = {}
        self._output: Any = None
        self._empty_steps = 0
        self._admitted: list[Record] = []
        self._generated = 0
        self._scheduled = 0
        scheduler.clock = lambda: self.now

    @property
    def unanswered(self) -> int:
        """Requests that were sent to it and have no answer."""
        return len(self._pending) + len(self._inbox)

    @property
    def may_begin(self) -> bool:
        """Whether it has something to do, and no step has begun.

        When nothing is scheduled some steps long, only a new request helps.
        """
        if self.ends is not None:
            return False
        stuck = self._empty_steps > _EMPTY_STEPS
        return bool(self._inbox or (self._pending and not stuck))

    def send(self, sent: float, name: str, turn: Turn, prompt: list[int]) -> Record:
        """Take a request; the scheduler gets it when the next step begins.

        Args:
            sent: when, in seconds on the clock.
            name: its id.
            turn: that it is.
            prompt: the whole one.
        """
        record = Record(name, turn.tenant, len(prompt), sent, engine=self._number)
        self.outcome.records.append(record)
        self._inbox.append(_Sent(turn, prompt, record))
        return record

    def begin_step(self, now: float) -> None:
        """Let the scheduler schedule, and set when the step ends."""
        self.now = now
        start = time.thread_time()
        for sent in self._inbox:
            self._add(sent)
        self._inbox.clear()
        output = self._scheduler.schedule()
        self.outcome.scheduler_cpu += time.thread_time() - start
        if output.total_num_scheduled_tokens:
            self._empty_steps = 0
            self.outcome.engine_steps += 1
        else:
            self._empty_steps += 1
        for new in output.scheduled_new_reqs:
            record = self._pending[new.req_id].record
            record.cached_tokens = new.num_computed_tokens
            self._admitted.append(record)
        self._output = output
        requests = self._scheduler.requests
        sizes = [
            (tokens, requests[name].num_computed_tokens)
            for name, tokens in output.num_scheduled_tokens.items()
        ]
        self.ends = now + (self._cost.seconds(sizes) if sizes else 0.0)

    def _add(self, sent: _Sent) -> None:
        turn, record = sent.turn, sent.record
        extra = {"tenant": turn.tenant} if turn.tenant else {}
        record.steps = -self.outcome.engine_steps
        self._pending[record.id] = sent
        self._scheduler.add_request(
            self._maker.make(
                record.id,
                sent.prompt,
                turn.max_tokens,
                arrival_time=record.sent,
                priority=turn.priority,
                cache_salt=turn.salt,
                extra_args={**extra, **turn.hints} or None,
            )
        )

    def _sampled(self, name: str) -> list[int]:
        """Return the token that a request gets in this step, if it gets one."""
        request = self._scheduler.requests[name]
        if request.num_computed_tokens < request.num_tokens:
            return []
        sent = self._pending[name]
        known = sent.turn.answer
        if known is None:
            known = self._answers.get(name)
        at = len(sent.answer)
        token = known[at] if known is not None else next(self._fresh)
        sent.answer.append(token)
        return [token]

    def end_step(self) -> list[Answered]:
        """Give the scheduler its results; return the requests that are answered."""
        assert self.ends is not None
        self.now, self.ends = self.ends, None
        output, scheduler = self._output, self._scheduler
        ids = list(output.num_scheduled_tokens)
        self._scheduled += output.total_num_scheduled_tokens
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=[self._sampled(name) for name in ids],
        )
        preemptions = {name: scheduler.requests[name].num_preemptions for name in ids}
        start = time.thread_time()
        outputs = scheduler.update_from_output(output, result)
        self.outcome.scheduler_cpu += time.thread_time() - start
        done = []
        for batch in outputs.values():
            for one in batch.outputs:
                sent = self._pending[one.request_id]
                record = sent.record
                if not record.first_token and one.new_token_ids:
                    record.first_token = self.now
                    record.steps += self.outcome.engine_steps
                if one.finish_reason is None:
                    continue
                del self._pending[record.id]
                record.finished = self.now
                record.preemptions = preemptions[record.id]
                self._generated += len(sent.answer)
                path = sent.prompt + sent.answer
                done.append(Answered(record.id, sent.turn, path))
        return done

    def close(self) -> Outcome:
        """Return the outcome, complete."""
        outcome = self.outcome
        outcome.seconds = self.now
        outcome.computed_prompt_tokens = (
            self._scheduled - self._generated + len(outcome.records)
        )
        self._count_overtakes()
        return outcome

    def _count_overtakes(self) -> None:
        """Count for each request those sent later and admitted before: n log n."""
        number = {id(record): i for i, record in enumerate(self.outcome.records)}
        before: list[int] = []
        for record in self._admitted:
            mine = number[id(record)]
            record.overtaken = len(before) - bisect_left(before, mine)
            insort(before, mine)
