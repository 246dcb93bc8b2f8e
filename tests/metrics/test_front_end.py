"""Samples on the wire and in the front end: nothing lost, nothing for others."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from vllm_radix.metrics.collector import RadixStatLogger, unregister
from vllm_radix.metrics.log_line import log_line
from vllm_radix.metrics.series import PREFIX, SERIES, Series, register
from vllm_radix.metrics.tally import Buckets
from vllm_radix.metrics.wire import RadixStats

CONFIG = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
INFO = {"version": "1", "policy": "prefix"}


@pytest.fixture(autouse=True)
def clean():
    unregister()
    yield
    unregister()


def python(code, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def sample():
    return RadixStats(
        info={"info": INFO},
        counters={"queried_tokens": [100], "hit_tokens": [64, 5]},
        gauges={"cached_blocks": [7], "held_requests": [2]},
        histograms={"held_seconds": [1, 0, 2, *[0] * 8, 0.15]},
    )


def record(logger, radix, engine=0):
    logger.record(SimpleNamespace(radix=radix), None, engine_idx=engine)


def value(name, engine="0", **labels):
    labels = {"model_name": "m", "engine": engine, **labels}
    return REGISTRY.get_sample_value(PREFIX + name, labels)


def test_samples_of_two_engines_add_up():
    logger = RadixStatLogger(CONFIG, [0, 1])
    assert value("queried_tokens_total", "1") == 0
    assert value("cached_blocks", "1") is None, "not known yet"
    for engine in (0, 1, 1):
        record(logger, sample(), engine)
    assert value("queried_tokens_total", "0") == 100
    assert value("queried_tokens_total", "1") == 200
    assert value("hit_tokens_total", "1", where="inside") == 10
    assert value("cached_blocks", "1") == 7
    assert value("info", "1", **INFO) == 1
    assert value("held_seconds_count", "1") == 6
    assert value("held_seconds_bucket", "1", le="0.01") == 2
    assert value("held_seconds_bucket", "1", le="0.1") == 6
    assert value("held_seconds_sum", "1") == pytest.approx(0.3)


def test_steps_without_a_sample_and_stocks_change_nothing():
    logger = RadixStatLogger(CONFIG, [0])
    record(logger, None)
    logger.record(SimpleNamespace(), None)
    logger.record(None, None)
    assert value("queried_tokens_total") == 0


def test_a_second_engine_in_a_process_takes_the_metrics_over():
    record(RadixStatLogger(CONFIG, [0]), sample())
    record(RadixStatLogger(CONFIG, [0]), sample())
    assert value("queried_tokens_total") == 100


def test_buckets_are_prometheus_own():
    """A value on a bound is in its bucket, for us as for the library."""
    bounds = SERIES["held_seconds"].buckets
    ours, logger = Buckets(bounds), RadixStatLogger(CONFIG, [0, 1])
    (theirs,) = logger._of("held_seconds", 1)
    for seconds in (*bounds, 0.0, 0.5, 1e9):
        ours.add(seconds)
        theirs.observe(seconds)
    record(logger, RadixStats(histograms={"held_seconds": [*ours.counts, ours.total]}))
    for le in (*map(str, map(float, bounds)), "+Inf"):
        buckets = [value("held_seconds_bucket", e, le=le) for e in ("0", "1")]
        assert buckets[0] == buckets[1] > 0
    assert value("held_seconds_sum", "0") == value("held_seconds_sum", "1")


def test_two_api_servers_add_counters_up_and_show_the_latest_gauge(tmp_path):
    code = """
import sys
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, multiprocess
from vllm_radix.metrics.collector import RadixStatLogger
from vllm_radix.metrics.wire import RadixStats
config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
logger = RadixStatLogger(config, [0], says=False)
number = int(sys.argv[1]) if len(sys.argv) > 1 else NUMBER
stats = RadixStats(counters={"queried_tokens": [number]},
                   gauges={"cached_blocks": [number]},
                   histograms={"held_seconds": [number, *[0] * 10, 0.5]})
logger.record(SimpleNamespace(radix=stats), None)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
labels = {"model_name": "m", "engine": "0"}
print([registry.get_sample_value("vllm_radix:" + name, labels) for name in (
    "queried_tokens_total", "cached_blocks", "held_seconds_count", "held_seconds_sum")])
"""
    folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    assert python(code.replace("NUMBER", "3"), **folder) == "[3.0, 3.0, 3.0, 0.5]"
    assert python(code.replace("NUMBER", "4"), **folder) == "[7.0, 4.0, 7.0, 1.0]"


_WIRE = """
from vllm_radix.plugin import register
register()
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm_radix.metrics.wire import RadixStats, attach
encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
def sent(stats):
    frames = encoder.encode(EngineCoreOutputs(scheduler_stats=stats))
    return decoder.decode(frames).scheduler_stats
stock = SchedulerStats(num_running_reqs=3, prefix_cache_stats=PrefixCacheStats(hits=4))
back = sent(stock)
assert type(stock) is SchedulerStats
assert (back.num_running_reqs, back.prefix_cache_stats.hits, back.radix) == (3, 4, None)
assert sent(None) is None
radix = RadixStats({"info": {"policy": "x"}}, {"a": [1, 2.5]}, {"b": [0]}, {"c": [1]})
attach(stock, radix)
back = sent(stock)
assert (back.num_running_reqs, back.radix) == (3, radix)
print("good")
"""


def test_a_sample_gets_through_and_stocks_statistics_too():
    assert python(_WIRE) == "good"


def test_without_the_plugin_a_sample_is_dropped_and_nothing_breaks():
    code = _WIRE.replace("register()\n", "", 1)
    code = code.replace(".radix) == (3, 4, None)", ".num_waiting_reqs) == (3, 4, 0)")
    code = code.replace("back.radix", "getattr(back, 'radix', radix)")
    assert python(code) == "good"


_MANAGERS = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.metrics.loggers import StatLoggerManager
def loggers(**options):
    config = EngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, **options
    ).create_engine_config()
    manager = StatLoggerManager(config, [0, 1], client_count=options.pop("clients", 1))
    return [type(one).__name__ for one in manager.stat_loggers]
stock = loggers()
ours = loggers(scheduler_cls="vllm_radix.RadixScheduler")
assert ours == [*stock, "RadixStatLogger"], (stock, ours)
print(stock)
"""


def test_the_logger_is_added_to_vllms_and_only_for_radix(model_folder):
    code = _MANAGERS.replace("sys.argv[1]", repr(model_folder))
    stock = python(code.partition("ours =")[0] + "print(stock)", VLLM_PLUGINS="")
    assert python(code, VLLM_PLUGINS="radix") == stock


# -- the line in the log -------------------------------------------------------


def test_a_line_says_what_happened_since_the_last(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.radix")
    logger = RadixStatLogger(CONFIG, [0, 1])
    logger.log()
    assert not caplog.records, "nothing happened"
    record(logger, sample(), 0)
    record(logger, sample(), 1)
    logger.log()
    logger.log()
    said = [r.getMessage() for r in caplog.records if r.name == "vllm.radix"]
    # Where the logger has a handler of its own, a line may be seen twice.
    (line,) = dict.fromkeys(said)
    assert "hit rate: 69.0%, tokens saved: 138 (10 inside blocks)" in line
    assert "cached: 14 of 0 blocks" in line and "held: 4 reqs" in line
    caplog.clear()
    record(logger, RadixStats(counters={"queried_tokens": [10]}))
    logger.log()
    assert "hit rate: 0.0%" in caplog.text


def test_one_of_several_api_servers_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.radix")
    logger = RadixStatLogger(CONFIG, [0], says=False)
    record(logger, sample())
    logger.log()
    assert not caplog.records


def test_the_line_names_the_bounds_that_were_reached():
    counted = {("admissions", "guard"): 3, ("admissions", "prefix"): 2}
    counted |= {("admissions", "group"): 5, ("admissions", "turn"): 9}
    line = log_line(counted, [])
    assert line.startswith("Radix: no request looked up, ")
    assert line.endswith(
        "admitted ahead of their turn: 7 reqs, bounds reached: guard 3"
    )


# -- the list ------------------------------------------------------------------

GOOD = {"name": "x", "kind": "gauge", "about": "x", "read": id, "use": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sum"}, "kind 'sum' is not one of counter, gauge, histogram, info"),
        ({"label": "why"}, "label and values go together"),
        ({"values": ("a",)}, "label and values go together"),
        ({"kind": "histogram"}, "needs buckets"),
        ({"buckets": (1,)}, "nothing else, needs buckets"),
        ({"kind": "histogram", "buckets": (2, 1)}, "do not grow"),
    ],
)
def test_a_metric_that_makes_no_sense_is_refused(change, message):
    Series(**GOOD)
    with pytest.raises(ValueError, match=message):
        Series(**{**GOOD, **change})


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="a metric 'hit_tokens' already"):
        register(Series(**{**GOOD, "name": "hit_tokens"}))


def test_names_keep_prometheus_conventions():
    for series in SERIES.values():
        assert series.full_name.startswith("vllm_radix:")
        assert not series.name.endswith("_total")
        if series.unit == "seconds":
            assert series.name.endswith("_seconds")
        assert series.unit or series.kind == "info"
        assert not series.about.endswith(".")
