"""Plain counts of what happens in the engine, kept where it happens."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from vllm_radix.metrics.series import (
    ADMISSIONS,
    EVICTIONS,
    HIT_PLACES,
    REASONS,
    SERIES,
)


class Buckets:
    """A histogram of plain numbers.

    Args:
        bounds: upper bounds of its buckets, without infinity.

    Attributes:
        counts: how many values fell into each bucket, and beyond the last bound.
        total: the sum of the values.
    """

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, ``count`` times: O(log buckets)."""
        self.counts[bisect_left(self._bounds, value)] += count
        self.total += value * count


class Tally:
    """Counts since the start; ``SERIES`` says what each means.

    Args:
        num_blocks: of the cache.

    Attributes:
        now: the time of this step, in seconds.
    """

    def __init__(self, num_blocks: int) -> None:
        self.now = 0.0
        self.queried_tokens = 0
        self.hit_tokens = dict.fromkeys(HIT_PLACES, 0)
        self.missed_tokens = dict.fromkeys(REASONS, 0)
        self.lookups = dict.fromkeys(REASONS, 0)
        self.evicted_blocks = dict.fromkeys(EVICTIONS, 0)
        self.evicted_idle_seconds = _buckets("evicted_idle_seconds")
        self.admissions = dict.fromkeys(ADMISSIONS, 0)
        self.overtakes = _buckets("overtakes")
        self.held_seconds = _buckets("held_seconds")
        self.ordering_seconds = _buckets("ordering_seconds")
        # When each block was last let go of.
        self._idle_since = array("d", bytes(8 * num_blocks))

    def note_lookup(self, num_tokens: int, num_hits: int, whole: int) -> None:
        """Count the look-up of a request that is admitted for the first time.

        Args:
            num_tokens: of its prompt.
            num_hits: those of them that are cached.
            whole: tokens between places where stock could go on.
        """
        self.queried_tokens += num_tokens
        inside = num_hits % whole
        self.hit_tokens["block_end"] += num_hits - inside
        self.hit_tokens["inside"] += inside

    def note_reason(self, reason: str, num_tokens: int) -> None:
        """Count why so many tokens of such a request were missed."""
        self.lookups[reason] += 1
        self.missed_tokens[reason] += num_tokens

    def note_idle(self, block_ids: Iterable[int]) -> None:
        """Note that no request uses blocks any more: O(1) each."""
        since, now = self._idle_since, self.now
        for block_id in block_ids:
            since[block_id] = now

    def note_evicted(self, block_ids: list[int]) -> None:
        """Count idle blocks that make room for others: O(1) each."""
        self.evicted_blocks["room"] += len(block_ids)
        since, now, ages = self._idle_since, self.now, self.evicted_idle_seconds
        # Blocks of a request are let go of, and evicted, at one time.
        last, count = 0.0, 0
        for block_id in block_ids:
            when = since[block_id]
            if when != last and count:
                ages.add(max(0.0, now - last), count)
                count = 0
            last = when
            count += 1
        if count:
            ages.add(max(0.0, now - last), count)

    def note_admission(self, reason: str, overtaken: int, held: float) -> None:
        """Count a request's first admission.

        Args:
            reason: why it was next; one of ``ADMISSIONS``.
            overtaken: later requests that were admitted before.
            held: seconds that it was held.
        """
        self.admissions[reason] += 1
        self.overtakes.add(overtaken)
        if held > 0:
            self.held_seconds.add(held)


def _buckets(name: str) -> Buckets:
    return Buckets(SERIES[name].buckets)
