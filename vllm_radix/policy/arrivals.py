"""The waiting requests in order of arrival, as arrays that are kept in place."""

import numpy as np

from vllm_radix.policy.queue_view import Bools, Ints

_MIN_SIZE = 64


class ArrivalTable:
    """Waiting requests by order of arrival.

    A request's row is its arrival less ``first``. Rows of requests that wait no more
    stay, unmarked, until those before them have gone as well.

    Attributes:
        first: the arrival of the first row.
    """

    def __init__(self) -> None:
        self.first = 0
        self._end = 0
        self._work = np.zeros(_MIN_SIZE, np.int64)
        self._blocks = np.zeros(_MIN_SIZE, np.int64)
        self._waiting = np.zeros(_MIN_SIZE, np.bool_)

    def add(self, arrival: int, work: int, blocks: int) -> None:
        """Add a request: O(1), amortised.

        Args:
            arrival: the next number, or a larger one.
            work: the work done when it arrived, in tokens.
            blocks: the blocks of its prompt.
        """
        if not self._end:
            self.first = arrival
        row = arrival - self.first
        assert row >= self._end, "arrivals grow"
        if row >= len(self._work):
            self._make_room(row)
            row = arrival - self.first
        self._work[self._end : row + 1] = work
        self._blocks[row] = blocks
        self._waiting[row] = True
        self._end = row + 1

    def _make_room(self, row: int) -> None:
        """Drop the rows before the oldest waiting request, and grow if need be."""
        waiting = self._waiting[: self._end]
        gone = int(waiting.argmax()) if waiting.any() else self._end
        size = len(self._work)
        while row - gone >= size // 2:
            size *= 2
        for name in ("_work", "_blocks", "_waiting"):
            before = getattr(self, name)
            after = np.zeros(size, before.dtype)
            after[: self._end - gone] = before[gone : self._end]
            setattr(self, name, after)
        self.first += gone
        self._end -= gone

    def remove(self, arrival: int) -> None:
        """Remove a request, O(1)."""
        self._waiting[arrival - self.first] = False

    def num_older(self, arrival: int) -> int:
        """Return how many requests arrived before one and still wait: O(n) bytes."""
        return int(np.count_nonzero(self._waiting[: max(0, arrival - self.first)]))

    def blocks_between(self, after: int, before: int) -> int:
        """Return the blocks of requests that wait, by arrival: O(n).

        Args:
            after: the arrival after which they are counted.
            before: the arrival before which they are counted.
        """
        start, end = max(0, after + 1 - self.first), max(0, before - self.first)
        return int(self._blocks[start:end][self._waiting[start:end]].sum())

    def mean_blocks(self) -> float:
        """Return the mean blocks of those that wait; 0 if there are none: O(n)."""
        blocks = self._blocks[: self._end][self._waiting[: self._end]]
        return float(blocks.mean()) if len(blocks) else 0.0

    def rows(self) -> tuple[Ints, Bools]:
        """Return the work at arrival of each row, and whether it waits: a view."""
        return self._work[: self._end], self._waiting[: self._end]
