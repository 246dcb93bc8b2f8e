"""Who may be overtaken once more without waiting too long."""

from collections.abc import Iterable

import numpy as np

from vllm_radix.policy.arrivals import ArrivalTable
from vllm_radix.policy.queue_view import Ints


class TailGuard:
    """Tracks how much longer each waiting request may be overtaken.

    Were all served by age from now on, a request would wait for those before it; what
    is left of the limit then is its slack. Each admission of a younger request takes
    the work of one admission off it.

    Args:
        table: the waiting requests.
        unavailable: arrivals of requests that this step cannot admit; they are not
            watched.
        planned: arrivals of those that are planned already, in that order.
        work: the work done so far, in tokens.
        work_per_admission: the work between two admissions, as of late.
        limit: the longest wait that is allowed, in work.
    """

    def __init__(
        self,
        table: ArrivalTable,
        unavailable: Iterable[int],
        planned: Iterable[int],
        work: int,
        work_per_admission: float,
        limit: float,
    ) -> None:
        arrived, waiting = table.rows()
        watched = waiting.copy()
        self._first = table.first
        self._each = work_per_admission
        for arrival in unavailable:
            watched[arrival - self._first] = False
        position: Ints = np.cumsum(watched) - watched
        self._slack = limit - (work - arrived) - position * work_per_admission
        self._slack[~watched] = np.inf
        for arrival in planned:
            self.note_planned(arrival)

    def allows(self, arrival: int) -> bool:
        """Return whether a request may overtake all older ones: O(n) in numpy."""
        older = self._slack[: arrival - self._first]
        return not len(older) or bool(older.min() >= self._each)

    def note_planned(self, arrival: int) -> None:
        """Note that a request goes next: O(n) in numpy."""
        row = arrival - self._first
        self._slack[row] = np.inf
        self._slack[:row] -= self._each
