"""How a sample gets from the engine to the front end.

It rides on vLLM's own ``SchedulerStats``, of which each step sends one to one front
end. The engine encodes what it is given; the front end decodes what its class declares:
so both must know of the field before the first decoder is made.
"""

from dataclasses import dataclass, field

from vllm_radix.engine.compat import EngineCoreOutputs, SchedulerStats


@dataclass
class RadixStats:
    """A sample: what is new since the last one, by the names of ``SERIES``.

    Attributes:
        info: labels of each info.
        counters: what was added, in the order of the label's values.
        gauges: what they are now, likewise.
        histograms: values by bucket, and at the end the sum of the values.
    """

    info: dict[str, dict[str, str]] = field(default_factory=dict)
    counters: dict[str, list[float]] = field(default_factory=dict)
    gauges: dict[str, list[float]] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class RadixSchedulerStats(SchedulerStats):
    """vLLM's statistics of a step, with a sample of radix's now and then."""

    radix: RadixStats | None = None


def attach(stats: SchedulerStats, radix: RadixStats) -> None:
    """Add a sample to the statistics of a step, in place: copying costs more."""
    stats.__class__ = RadixSchedulerStats
    stats.radix = radix  # type: ignore[attr-defined]


def declare() -> None:
    """Let decoders made from now on keep the samples."""
    annotations = EngineCoreOutputs.__annotations__
    annotations["scheduler_stats"] = RadixSchedulerStats | None
