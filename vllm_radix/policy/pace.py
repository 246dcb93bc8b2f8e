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
"""Admissions over which the pace is taken."""

_ENOUGH = 24
"""Admissions before there is a pace."""

_MEMORY = 3.0
"""How long a long queue is remembered, in multiples of the wait that it meant."""


class Pace:
    """Watches admissions and the queue.

    Attributes:
        work: done so far, in tokens: the clock.
        each: work between admissions while requests were waiting.
        known: whether that was measured; else it is a guess.
        limit: the longest wait of late, in work, for a newcomer served after all
            who wait: what the guard allows.
    """

    def __init__(self) -> None:
        self.work = 0
        self.each = 0.0
        self.known = False
        self.limit = 0.0
        # Whether the last step left requests waiting, and work done in such a state.
        self._in_backlog = False
        self._busy = 0
        # (work done by then, how many) of the last admissions, and how many in all.
        self._admitted: deque[tuple[int, int]] = deque()
        self._count = 0
        # (work, requests waiting), and (work, wait) with waits falling.
        self._queue: deque[tuple[int, int]] = deque()
        self._waits: deque[tuple[int, float]] = deque()
        # What serving in order of arrival would have cost in addition.
        self._saved: deque[int] = deque(maxlen=_WINDOW)
        self._saved_sum = 0

    def note(self, tokens: int, waiting: int, saved: list[int]) -> None:
        """Note a step that was scheduled: O(admissions).

        Args:
            tokens: scheduled in it.
            waiting: requests that still wait.
            saved: of each admitted request, tokens that were cached and would not
                have been in order of arrival.
        """
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
            if self._count - first >= _ENOUGH:
                self.each = (self._busy - start) / (self._count - first)
                self.known = True
        work = max(STEP, tokens) if tokens else 0
        self.work += work
        self._in_backlog = waiting > 0
        if self._in_backlog:
            self._busy += work

    def watch(self, waiting: int, guess: float) -> None:
        """Work out the limit again: O(1), amortised.

        A queue that grows is taken to go on growing for as long as it takes to
        serve it: who comes last meets the longer one.

        Args:
            waiting: requests that wait.
            guess: work between admissions, for as long as there is no pace.
        """
        now = self.work
        if not self.known:
            self.each = max(guess, STEP)
        each = self.each
        if self._saved:
            each += self._saved_sum / len(self._saved)
        self._queue.append((now, waiting))
        wait = waiting * each
        while len(self._queue) > 2 and self._queue[1][0] < now - wait:
            self._queue.popleft()
        then, before = self._queue[0]
        growth = max(0, waiting - before) * each / max(now - then, wait, 1e-9)
        wait *= 1.0 + growth
        while self._waits and self._waits[-1][1] <= wait:
            self._waits.pop()
        self._waits.append((now, wait))
        while self._waits[0][0] < now - _MEMORY * self._waits[0][1]:
            self._waits.popleft()
        self.limit = self._waits[0][1]


class Turns:
    """When each request's turn would have come, first come, first served.

    By count: the turn of the request that arrived n-th comes with the n-th
    departure, whoever departs.

    Attributes:
        departed: requests that do not wait any more.
    """

    def __init__(self) -> None:
        self.departed = 0
        # Times of departures from the ``_first``-th on.
        self._first = 0
        self._times: list[float] = []

    def depart(self, now: float, count: int, oldest: int) -> None:
        """Note that requests left the queue: O(count), amortised.

        Args:
            now: when.
            count: how many.
            oldest: arrival of the oldest that still waits, or of the next to come.
        """
        self._times += [now] * count
        self.departed += count
        past = min(oldest, self.departed) - self._first
        if past > len(self._times) // 2:
            del self._times[:past]
            self._first += past

    def since(self, arrival: int) -> float | None:
        """Return when a request's turn came; None when it has not yet. O(1)."""
        if arrival >= self.departed:
            return None
        return self._times[max(0, arrival - self._first)]

    def overtaken(self, arrival: int, older: int) -> int:
        """Return how many later requests departed first.

        Args:
            arrival: of the request.
            older: requests that arrived before it and still wait.
        """
        return max(0, self.departed + older - arrival)
