"""When each request would have been admitted, first come, first served."""


class FcfsTurns:
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

    def overtaken(self, arrival: int, older: int, planned: int = 0) -> int:
        """Return how many later requests departed first.

        Args:
            arrival: of the request.
            older: requests that arrived before it and still wait, but for planned ones.
            planned: requests that are about to depart.
        """
        return max(0, self.departed + planned + older - arrival)
