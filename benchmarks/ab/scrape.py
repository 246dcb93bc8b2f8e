"""What servers count: read from /metrics, before, during and after a run."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

from vllm_radix_bench.ab.servers import Server
from vllm_radix_bench.ab.web import HttpError, get

SAMPLE_SECONDS = 0.5
_TICK_SECONDS = 0.05
_LEAST_SILENCE = 30.0
"""Seconds without metrics before a server counts as hung."""

PROMPT = "vllm:prompt_tokens_total"
CACHED = "vllm:prompt_tokens_cached_total"
GENERATED = "vllm:generation_tokens_total"
PREEMPTED = "vllm:num_preemptions_total"
FOUND = "vllm:prefix_cache_hits_total"
ASKED = "vllm:prefix_cache_queries_total"
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_MOVING = (PROMPT, GENERATED, FOUND, ASKED, *_BUSY)


@dataclass
class Scrape:
    """Metrics of one moment.

    Attributes:
        sums: of each metric, over its labels.
        labels: of each sample, by metric.
    """

    sums: dict[str, float]
    labels: dict[str, list[dict[str, str]]]

    def labels_of(self, name: str) -> list[dict[str, str]]:
        """Return the labels of each sample of a metric."""
        return self.labels.get(name, [])

    def has(self, prefix: str) -> bool:
        """Whether there is a metric whose name begins so."""
        return any(name.startswith(prefix) for name in self.sums)

    @property
    def is_busy(self) -> bool:
        """Whether the server has requests."""
        return any(self.sums.get(name) for name in _BUSY)

    def since(self, before: "Scrape", name: str) -> float:
        """Return what a counter has grown by; 0 where there is none."""
        return self.sums.get(name, 0.0) - before.sums.get(name, 0.0)


def parse(text: str) -> Scrape:
    """Return the metrics of a text in Prometheus' format.

    Raises:
        ValueError: it is none.
    """
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = defaultdict(float)
    labels: dict[str, list[dict[str, str]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] += sample.value
            if sample.name.endswith("_info"):
                labels[sample.name].append(dict(sample.labels))
    return Scrape(dict(sums), dict(labels))


def scrape(server: Server) -> Scrape:
    """Return the metrics of a server.

    Raises:
        HttpError: it does not answer.
    """
    try:
        return parse(get(f"{server.base_url}/metrics", server.headers).decode())
    except (ValueError, UnicodeDecodeError) as error:
        raise HttpError(f"the metrics cannot be read ({error})") from error


def hit_rate(before: Scrape, now: Scrape) -> float | None:
    """Return the share of prompt tokens found cached; None if none was looked up."""
    asked = now.since(before, ASKED)
    return now.since(before, FOUND) / asked if asked else None


@dataclass
class Watch:
    """Follows a server during a run: a hit rate over time, and whether it hangs.

    Args:
        server: to follow.
        stall_seconds: after which a server with requests that counts nothing has hung.

    Attributes:
        before: metrics at the start.
        hit_rates: seconds since the start, and the hit rate until then.
    """

    server: Server
    stall_seconds: float
    before: Scrape = field(init=False)
    hit_rates: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = scrape(self.server)
        self._start = self._moved = self._answered = time.monotonic()
        self._last: tuple[float, ...] = ()
        self._late: list[float] = []

    async def run(self) -> None:
        """Sample until cancelled.

        Raises:
            ServerError: the server died or hangs.
        """
        while True:
            for _ in range(round(SAMPLE_SECONDS / _TICK_SECONDS)):
                before = time.monotonic()
                await asyncio.sleep(_TICK_SECONDS)
                self._late.append(time.monotonic() - before - _TICK_SECONDS)
            self.server.check_alive()
            try:
                now = await asyncio.to_thread(scrape, self.server)
            except HttpError as error:
                silent = time.monotonic() - self._answered
                if silent > max(_LEAST_SILENCE, self.stall_seconds):
                    raise self.server.error(f"does not answer ({error})") from error
                continue
            self.note(now, time.monotonic())

    def late_by(self) -> float:
        """Return by how many seconds things beside it were late, on average."""
        return max(0.0, sum(self._late) / len(self._late)) if self._late else 0.0

    def note(self, now: Scrape, at: float) -> None:
        """Note metrics of a moment.

        Raises:
            ServerError: nothing has been counted for too long.
        """
        self._answered = at
        rate = hit_rate(self.before, now)
        if rate is not None:
            self.hit_rates.append((at - self._start, rate))
        seen = tuple(now.sums.get(name, 0.0) for name in _MOVING)
        if seen != self._last or not now.is_busy:
            self._last, self._moved = seen, at
        elif at - self._moved > self.stall_seconds:
            raise self.server.error(
                f"hangs: it has had requests for {self.stall_seconds:.0f} s and "
                "counted no token (--stall-timeout)"
            )


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most ``most`` points, the last one among them."""
    step = max(1, -(-len(points) // most))
    return points[::-1][::step][::-1]


def counts(before: Scrape, after: Scrape) -> dict[str, float]:
    """Return what a server counted between two moments, in tokens and requests."""
    prompt, cached = after.since(before, PROMPT), after.since(before, CACHED)
    return {
        "prompt_tokens": int(prompt),
        "cached_tokens": int(cached),
        "computed_tokens": int(prompt - cached),
        "generated_tokens": int(after.since(before, GENERATED)),
        "hit_rate": cached / prompt if prompt else 0.0,
        "preemptions": int(after.since(before, PREEMPTED)),
    }
