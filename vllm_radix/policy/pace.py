"""How long the queue would make a newcomer wait, first come, first served.

That is what a reorder is measured against: it may let a request wait until then,
whenever its own turn would have been. Longest waits then stay about those of first
come, first served, and everything below them is free to be reordered.
"""

from collections import deque
from itertools import islice

_WINDOW = 64
"""Admissions over which the pace is taken."""

_ENOUGH = 24
"""Admissions before there is a pace."""

_MEMORY = 3.0
"""How long a long queue is remembered, in multiples of the wait that it meant."""


class Pace:
    """Watches admissions and the queue.

    Attributes:
        seconds: between admissions while requests were waiting; 0 while unknown.
        limit: the longest wait of late, in seconds, for a newcomer served after all
            who wait: what the guard allows.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.limit = 0.0
        self._busy = 0.0
        # When the last step was scheduled, if it left requests waiting.
        self._last: float | None = None
        self._in_backlog = False
        self._admitted: deque[float] = deque(maxlen=_WINDOW)
        # (time, requests waiting), and (time, wait) with waits falling.
        self._queue: deque[tuple[float, int]] = deque()
        self._waits: deque[tuple[float, float]] = deque()
        # What serving in order of arrival would have cost in addition.
        self._saved: deque[int] = deque(maxlen=_WINDOW)
        self._saved_sum = 0
        self._fit = _Line()
        self._step: tuple[float, int] | None = None

    def start_step(self, now: float) -> None:
        """Note the time, in seconds, at which a step is scheduled."""
        if self._step is not None:
            start, tokens = self._step
            if tokens and now > start:
                self._fit.add(tokens, now - start)
        self._step = None
        self._in_backlog = self._last is not None
        if self._last is not None:
            self._busy += max(0.0, now - self._last)

    def end_step(self, now: float, tokens: int, waiting: int, saved: list[int]) -> None:
        """Note what a step admitted.

        Args:
            now: when it was scheduled.
            tokens: scheduled in it.
            waiting: requests that still wait.
            saved: of each admitted request, tokens that were cached and would not
                have been in order of arrival.
        """
        self._step = now, tokens
        self._last = now if waiting else None
        if not self._in_backlog:
            return
        for tokens_saved in saved:
            self._admitted.append(self._busy)
            if len(self._saved) == _WINDOW:
                self._saved_sum -= self._saved[0]
            self._saved.append(tokens_saved)
            self._saved_sum += tokens_saved
        count = len(self._admitted)
        if count >= _ENOUGH and self._busy > self._admitted[0]:
            self.seconds = (self._busy - self._admitted[0]) / count

    def watch(self, now: float, waiting: int) -> None:
        """Work out the limit again: O(1), amortised.

        A queue that grows is taken to go on growing for as long as it takes to
        serve it: who comes last meets the longer one.

        Args:
            now: the time, in seconds.
            waiting: requests that wait.
        """
        self._queue.append((now, waiting))
        each = self.seconds
        if not each:
            return
        if self._saved:
            each += self._fit.slope * self._saved_sum / len(self._saved)
        wait = waiting * each
        while len(self._queue) > 2 and self._queue[1][0] < now - wait:
            self._queue.popleft()
        then, before = self._queue[0]
        growth = max(0, waiting - before) * each / max(now - then, wait, 1e-9)
        wait *= 1.0 + min(1.0, growth)
        while self._waits and self._waits[-1][1] <= wait:
            self._waits.pop()
        self._waits.append((now, wait))
        while self._waits[0][0] < now - _MEMORY * self._waits[0][1]:
            self._waits.popleft()
        self.limit = self._waits[0][1]


class _Line:
    """A line through points, old ones forgotten."""

    _KEEP = 0.98

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.slope = 0.0

    def add(self, x: float, y: float) -> None:
        """Add a point, O(1)."""
        keep = self._KEEP
        self._n = self._n * keep + 1
        self._x = self._x * keep + x
        self._y = self._y * keep + y
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * y
        spread = self._n * self._xx - self._x**2
        if spread > 1e-6 * self._n * self._xx:
            self.slope = max(0.0, (self._n * self._xy - self._x * self._y) / spread)


class Turns:
    """When each request's turn would have come, first come, first served.

    By count: the turn of the request that arrived n-th comes with the n-th
    departure, whoever departs.

    Attributes:
        departed: requests that do not wait any more.
    """

    def __init__(self) -> None:
        self.departed = 0
        self._first = 0
        self._times: deque[float] = deque()

    def depart(self, now: float, count: int, oldest: int) -> None:
        """Note that requests left the queue.

        Args:
            now: when.
            count: how many.
            oldest: arrival of the oldest that still waits, or of the next to come.
        """
        self._times.extend([now] * count)
        self.departed += count
        while self._first < min(oldest, self.departed):
            self._times.popleft()
            self._first += 1

    def since(self, arrival: int) -> float | None:
        """Return when a request's turn came; None when it has not yet. O(1)."""
        if arrival >= self.departed:
            return None
        at = max(0, arrival - self._first)
        return next(islice(self._times, at, None), None)

    def overtaken(self, arrival: int, older: int) -> int:
        """Return how many later requests departed first.

        Args:
            arrival: of the request.
            older: requests that arrived before it and still wait.
        """
        return max(0, self.departed + older - arrival)
