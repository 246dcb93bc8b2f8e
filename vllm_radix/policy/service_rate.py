"""How long the queue would make a newcomer wait, first come, first served.

That is what a reorder is measured against: it may let a request wait until then,
whenever its own turn would have been. Longest waits then stay about those of first
come, first served, and everything below them is free to be reordered.

Time is counted in work, not in seconds: the same requests are served in the same
order on any machine, with a model or without.
"""

from collections import deque

STEP = 256
"""Tokens that a step is worth at least: with fewer, a GPU waits for its memory.

The ridge of the roofline: an H100 computes about 250 tokens of a dense model in the
time in which it reads the weights.
"""

_WINDOW = 64
"""Admissions over which the rate is measured."""

_MIN_ADMISSIONS = 24
"""Admissions before the rate is measured."""

_QUEUE_MEMORY = 3.0
"""How long a long queue is remembered, in multiples of the wait that it meant."""


class ServiceRate:
    """Estimates how long first come, first served, would make a newcomer wait.

    From the rate of admissions of late, and the length of the queue.

    Attributes:
        work: the work done so far, in tokens: the clock.
        work_per_admission: the work between admissions while requests were waiting.
        known: whether that was measured; else it is a guess.
        wait_limit: the longest wait of late, in work, that a newcomer would have had,
            first come, first served: what the tail guard allows.
        num_follow_ups: requests so far that came because others were answered; its
            owner counts them.
    """

    def __init__(self) -> None:
        self.work = 0
        self.work_per_admission = 0.0
        self.known = False
        self.wait_limit = 0.0
        self.num_follow_ups = 0
        self._num_admitted = 0
        # Whether the last step left requests waiting, and work done in such a state.
        self._in_backlog = False
        self._busy = 0
        # (work done by then, how many) of the last admissions, and how many in all.
        self._admitted: deque[tuple[int, int]] = deque()
        self._count = 0
        # (work, requests waiting, follow-ups less admissions), and (work, wait) with
        # waits falling.
        self._queue: deque[tuple[int, float, int]] = deque()
        self._waits: deque[tuple[int, float]] = deque()
        # What serving in order of arrival would have cost in addition.
        self._saved: deque[int] = deque(maxlen=_WINDOW)
        self._saved_sum = 0

    def observe_step(self, tokens: int, waiting: int, saved: list[int]) -> None:
        """Note a step that was scheduled: O(admissions).

        Args:
            tokens: scheduled in it.
            waiting: requests that still wait.
            saved: of each admitted request, tokens that were cached and would not
                have been in order of arrival.
        """
        self._num_admitted += len(saved)
        if self._in_backlog and saved:
            self._admitted.append((self._busy, len(saved)))
            self._count += len(saved)
            last = self._admitted
            while len(last) > 2 and self._count - last[0][1] - last[1][1] >= _WINDOW:
                self._count -= last.popleft()[1]
            for tokens_saved in saved:
                if len(self._saved) == _WINDOW:
                    self._saved_sum -= self._saved[0]
                self._saved.append(tokens_saved)
                self._saved_sum += tokens_saved
            start, first = self._admitted[0]
            if self._count - first >= _MIN_ADMISSIONS:
                self.work_per_admission = (self._busy - start) / (self._count - first)
                self.known = True
        work = max(STEP, tokens) if tokens else 0
        self.work += work
        self._in_backlog = waiting > 0
        if self._in_backlog:
            self._busy += work

    def observe_queue(self, waiting: int, guess: float) -> None:
        """Work out the limit again: O(1), amortised.

        A queue that grows is taken to go on growing for as long as it takes to
        serve it: the request that comes last meets the longer queue.

        What the order saves admits requests sooner, and then what follows from their
        answers comes sooner too: of the follow-ups by which the queue has grown of
        late, first come, first served, would have caused fewer, as many as it would
        have admitted fewer.

        Args:
            waiting: requests that wait.
            guess: the work between admissions, as long as it is not measured.
        """
        now = self.work
        if not self.known:
            self.work_per_admission = max(guess, STEP)
        each = self.work_per_admission
        if self._saved:
            each += self._saved_sum / len(self._saved)
        surplus = self.num_follow_ups - self._num_admitted
        self._queue.append((now, waiting, surplus))
        wait = waiting * each
        while len(self._queue) > 2 and self._queue[1][0] < now - wait:
            self._queue.popleft()
        then, before, surplus_before = self._queue[0]
        share = 1 - self.work_per_admission / max(each, 1e-9)
        early = max(0, surplus - surplus_before) * share
        length = max(0.0, waiting - early)
        wait = length * each
        growth = max(0.0, length - before) * each / max(now - then, wait, 1e-9)
        wait *= 1.0 + growth
        while self._waits and self._waits[-1][1] <= wait:
            self._waits.pop()
        self._waits.append((now, wait))
        while self._waits[0][0] < now - _QUEUE_MEMORY * self._waits[0][1]:
            self._waits.popleft()
        self.wait_limit = self._waits[0][1]
