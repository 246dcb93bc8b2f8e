"""Samples of the counts, as often as somebody could want to see them."""

from typing import Any

from vllm_radix.metrics.series import SERIES, Series
from vllm_radix.metrics.tally import Buckets
from vllm_radix.metrics.wire import RadixStats, attach

INTERVAL = 0.5
"""Seconds between two samples while there is work."""


class Sampler:
    """Adds samples to vLLM's statistics: every half second, and when work ends.

    Counts go as what is new since the last sample, for each sample reaches one front
    end only and these add up.

    Args:
        scheduler: radix's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._sent: dict[str, list[float]] = {}
        self._last: float | None = None

    def add_to(self, stats: Any, now: float) -> None:
        """Add a sample to the statistics of a step, if it is time for one.

        Args:
            stats: vLLM's.
            now: the time, in seconds.
        """
        works = (
            stats.num_running_reqs
            or stats.num_waiting_reqs
            or stats.num_skipped_waiting_reqs
        )
        # The last step of all sends all; another one may not come for long.
        if works and self._last is not None and 0 <= now - self._last < INTERVAL:
            return
        self._last = now
        attach(stats, self.sample())

    def sample(self) -> RadixStats:
        """Return what is new since the last call: O(metrics)."""
        sample = RadixStats()
        for name, series in SERIES.items():
            value = series.read(self._scheduler)
            if value is None:
                continue
            if series.kind == "info":
                sample.info[name] = value
                continue
            numbers = _numbers(series, value)
            if series.kind == "gauge":
                sample.gauges[name] = numbers
                continue
            sent = self._sent.get(name)
            self._sent[name] = numbers
            new = numbers
            if sent is not None:
                new = [n - s for n, s in zip(numbers, sent, strict=True)]
            if any(new):
                kind = series.kind == "counter"
                (sample.counters if kind else sample.histograms)[name] = new
        return sample


def _numbers(series: Series, value: Any) -> list[float]:
    """Return what was read as a list, which is a copy."""
    if isinstance(value, Buckets):
        return [*value.counts, value.total]
    if series.label:
        return [value[one] for one in series.values]
    return [value]
