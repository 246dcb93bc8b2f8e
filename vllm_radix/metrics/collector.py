"""The Prometheus metrics, and a line in the log, in vLLM's front end.

vLLM hands every step's statistics to its loggers; this is one more, beside its own.
With several API servers each counts what reached it, and the client library adds up:
all metrics are the library's own, for it does so for no others.
"""

from collections import Counter as Counts
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from vllm_radix.engine.compat import AggregateStatLoggerBase, VllmConfig, logger
from vllm_radix.metrics.log_line import log_line
from vllm_radix.metrics.series import PREFIX, SERIES, Series
from vllm_radix.metrics.wire import RadixStats

_LABELS = ("model_name", "engine")
"""Of every metric, as of vLLM's."""


def unregister() -> None:
    """Remove the metrics of an engine before: a process shows those of its last."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)


class RadixStatLogger(AggregateStatLoggerBase):
    """Shows the samples of the engines.

    Counters and histograms are there from the start, at 0; gauges and the info from an
    engine's first sample on.

    Args:
        vllm_config: of the engines.
        engine_indexes: of the engines.
        says: whether to log a line, too.
    """

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: list[int], says: bool = True
    ) -> None:
        unregister()
        self._model = vllm_config.model_config.served_model_name
        self._says = says
        self._families = {
            name: _family(series)
            for name, series in SERIES.items()
            if series.kind != "info"
        }
        self._infos: dict[tuple[str, int], Any] = {}
        self._children: dict[tuple[str, int], list[Any]] = {}
        # Since the last line.
        self._counted: Counts[tuple[str, str]] = Counts()
        self._gauges: dict[int, dict[str, float]] = {}
        self._is_news = False
        for engine in engine_indexes:
            for name, series in SERIES.items():
                if series.kind in ("counter", "histogram"):
                    self._of(name, engine)

    def _of(self, name: str, engine: int) -> list[Any]:
        """Return an engine's metrics of a name, one for each value of the label."""
        known = self._children.get((name, engine))
        if known is None:
            family, values = self._families[name], SERIES[name].values
            labels = self._model, str(engine)
            known = self._children[name, engine] = (
                [family.labels(*labels, value) for value in values]
                if values
                else [family.labels(*labels)]
            )
        return known

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add the sample of an engine's step, if it has one."""
        sample = getattr(scheduler_stats, "radix", None)
        if sample is not None:
            self._add(sample, engine_idx)

    def _add(self, sample: RadixStats, engine: int) -> None:
        self._is_news = True
        for name, labels in sample.info.items():
            self._describe(name, labels, engine)
        for name, gauges in sample.gauges.items():
            for child, number in zip(self._of(name, engine), gauges, strict=True):
                child.set(number)
            self._gauges.setdefault(engine, {})[name] = sum(gauges)
        for name, added in sample.counters.items():
            values = SERIES[name].values or ("",)
            children = self._of(name, engine)
            for child, value, number in zip(children, values, added, strict=True):
                child.inc(number)
                self._counted[name, value] += int(number)
        for name, (*counts, total) in sample.histograms.items():
            (child,) = self._of(name, engine)
            # The library has no public way to add many values at once.
            for bucket, number in zip(child._buckets, counts, strict=True):
                bucket.inc(number)
            child._sum.inc(total)

    def _describe(self, name: str, labels: dict[str, str], engine: int) -> None:
        """Show what serves, as a gauge that is always 1, as vLLM does."""
        if (name, engine) in self._infos:
            return
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = _gauge(SERIES[name], tuple(labels))
        self._infos[name, engine] = family.labels(
            self._model, str(engine), *labels.values()
        )
        self._infos[name, engine].set(1)

    def log_engine_initialized(self) -> None:
        """Do nothing: the scheduler says in the log what serves."""

    def log(self) -> None:
        """Log a line on what happened since the last one, if anything did."""
        if not self._says or not self._is_news:
            return
        logger.info("%s", log_line(self._counted, self._gauges.values()))
        self._counted.clear()
        self._is_news = False


def _family(series: Series) -> Any:
    labels = (series.label,) if series.label else ()
    if series.kind == "gauge":
        return _gauge(series, labels)
    arguments: dict[str, Any] = {
        "name": series.full_name,
        "documentation": f"{series.about}.",
        "labelnames": (*_LABELS, *labels),
    }
    if series.kind == "histogram":
        return Histogram(**arguments, buckets=series.buckets)
    return Counter(**arguments)


def _gauge(series: Series, labels: tuple[str, ...]) -> Any:
    return Gauge(
        name=series.full_name,
        documentation=f"{series.about}.",
        labelnames=(*_LABELS, *labels),
        multiprocess_mode="mostrecent",
    )
