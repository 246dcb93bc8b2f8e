"""The metrics: what each is called, what it says, and where its number is read.

Everything else reads ``SERIES``: the engine what to send, the front end what to show,
the documentation its table, ``vllm-radix top`` and the dashboard their names.
docs/extending.md has the recipe for one more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vllm_radix

PREFIX = "vllm_radix:"
"""Not ``vllm:``, for vLLM unregisters all that begins so when its own logger starts."""

KINDS = ("counter", "gauge", "histogram", "info")

HIT_PLACES = ("block_end", "inside")

REASONS = (
    *("evicted", "diverged", "unseen", "apart", "pending", "unused", "unkept"),
    *("given_up", "complete"),
)
"""Why a cached prefix ends where it does; see ``vllm_radix.engine.miss_log``."""

EVICTIONS = ("room", "duplicate", "dropped", "reset")

WISH_ENDS = ("time", "used", "quota", "refused", "gone", "reset")
"""Why what a client asked to keep is kept no longer."""

ADMISSIONS = ("turn", "prefix", "group", "overtakes", "wait", "every", "guard")
"""See ``vllm_radix.policy.PlannedAdmission``."""

BOUNDS = ("overtakes", "wait", "every", "guard")
"""Those of ``ADMISSIONS`` that are bounds: the oldest request went because of one."""


@dataclass(frozen=True)
class Series:
    """A metric, with a series for each value of its label.

    Attributes:
        name: without ``vllm_radix:``; a counter is shown with ``_total``.
        kind: one of ``KINDS``.
        about: what it says, in a sentence without its full stop.
        read: takes the scheduler and returns the number: of a counter since the
            start; a dict of numbers by the label's values; ``Buckets`` of a histogram;
            a dict of text of an info. None where it has no meaning.
        use: what it tells an operator.
        unit: of the number.
        label: name of the label, besides ``model_name`` and ``engine``.
        values: of the label.
        buckets: upper bounds of a histogram's buckets, without infinity.
        only: where it has a meaning, if not everywhere.

    Raises:
        ValueError: they do not go together.
    """

    name: str
    kind: str
    about: str
    read: Callable[[Any], Any]
    use: str
    unit: str = ""
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    only: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"metric {self.name!r}: kind {self.kind!r} is not one of "
                f"{', '.join(KINDS)}"
            )
        if bool(self.label) != bool(self.values):
            raise ValueError(f"metric {self.name!r}: label and values go together")
        if (self.kind == "histogram") != bool(self.buckets):
            raise ValueError(
                f"metric {self.name!r}: a histogram, and nothing else, needs buckets"
            )
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"metric {self.name!r}: its buckets do not grow")

    @property
    def full_name(self) -> str:
        """The name of its family, as a Prometheus client has it."""
        return PREFIX + self.name

    @property
    def shown(self) -> str:
        """The name that ``/metrics`` shows, and queries use."""
        return self.full_name + ("_total" if self.kind == "counter" else "")

    @property
    def sample_names(self) -> tuple[str, ...]:
        """Names of all its samples, as queries use them."""
        if self.kind == "histogram":
            return tuple(self.full_name + end for end in ("_bucket", "_sum", "_count"))
        return (self.shown,)


SERIES: dict[str, Series] = {}
"""All metrics by name, in the order in which pages show them."""


def register(series: Series) -> Series:
    """Add a metric, before an engine is made; return it.

    Raises:
        ValueError: there is another one of that name.
    """
    if series.name in SERIES:
        raise ValueError(f"there is a metric {series.name!r} already")
    SERIES[series.name] = series
    return series


def _pool(scheduler: Any) -> Any:
    return scheduler.kv_cache_manager.block_pool


def _tree(scheduler: Any) -> Any:
    return _pool(scheduler).tree


def _counted(name: str) -> Callable[[Any], Any]:
    """Return what reads a count."""
    return lambda scheduler: getattr(scheduler.tally, name)


def _explained(name: str) -> Callable[[Any], Any]:
    """Return what reads a count that is kept where misses are explained."""

    def read(scheduler: Any) -> Any:
        explained = scheduler.kv_cache_manager.miss_log is not None
        return getattr(scheduler.tally, name) if explained else None

    return read


def _wished(name: str) -> Callable[[Any], Any]:
    """Return what reads a figure of what clients ask to be kept."""

    def read(scheduler: Any) -> Any:
        notes = getattr(_pool(scheduler), "hint_notes", None)
        return None if notes is None else getattr(notes.wishes, name)

    return read


def _ordered(of: str, name: str) -> Callable[[Any], Any]:
    """Return what reads a figure that there is where radix orders the requests.

    Args:
        of: the attribute of the scheduler that has it.
        name: of the figure.
    """

    def read(scheduler: Any) -> Any:
        ordered = scheduler.admission is not None
        return getattr(getattr(scheduler, of), name) if ordered else None

    return read


def _describe(scheduler: Any) -> dict[str, str]:
    """Return what serves."""
    config = scheduler.radix_config
    manager = scheduler.kv_cache_manager
    ordered = scheduler.admission is not None
    return {
        "version": vllm_radix.__version__,
        "policy": config.policy if ordered else "fcfs",
        "patience": f"{config.patience:g}",
        "eviction": config.eviction if manager.plans is None else "resume-points",
        "manager": type(manager).__name__,
    }


_EXPLAINED = "with `explain`"
_ONE_GROUP = "one cache group"
_ORDERED = "where radix orders"

for _series in (
    Series(
        "info",
        "info",
        "1, with what serves in its labels, from an engine's first step on",
        _describe,
        "whether radix is on, which version, and with which options",
    ),
    # -- the cache -----------------------------------------------------------------
    Series(
        "queried_tokens",
        "counter",
        "Prompt tokens looked up in the cache, at a request's first admission",
        _counted("queried_tokens"),
        "equals `vllm:prefix_cache_queries_total`",
        unit="tokens",
    ),
    Series(
        "hit_tokens",
        "counter",
        "Prompt tokens found in the cache, which were not computed: tokens saved",
        _counted("hit_tokens"),
        "the gain; the sum equals `vllm:prefix_cache_hits_total`, and `inside` is what "
        "stock would have computed from the last block end on",
        unit="tokens",
        label="where",
        values=HIT_PLACES,
    ),
    Series(
        "missed_tokens",
        "counter",
        "Prompt tokens not found in the cache, by why the prefix ended there",
        _explained("missed_tokens"),
        "what to do about misses: see the reasons below",
        unit="tokens",
        label="reason",
        values=REASONS[:-1],
        only=_EXPLAINED,
    ),
    Series(
        "lookups",
        "counter",
        "Requests admitted, by why their cached prefix ended where it did",
        _explained("lookups"),
        "the same by requests; `complete`: all that can be was cached",
        unit="requests",
        label="reason",
        values=REASONS,
        only=_EXPLAINED,
    ),
    Series(
        "evicted_blocks",
        "counter",
        "Blocks that left the cache. room: for new ones; duplicate: another block has "
        "the same tokens; dropped: not computed after all, or failed to load; reset: "
        "with the whole cache",
        _counted("evicted_blocks"),
        "`room` is pressure; compare it with `vllm_radix:pool_blocks`",
        unit="blocks",
        label="reason",
        values=EVICTIONS,
    ),
    Series(
        "evicted_idle_seconds",
        "histogram",
        "Time since blocks evicted for room were last used",
        _counted("evicted_idle_seconds"),
        "how long a prefix stays cached unused: turns of a conversation that come "
        "later miss",
        unit="seconds",
        buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000),
    ),
    Series(
        "pool_blocks",
        "gauge",
        "Blocks of the cache",
        lambda scheduler: _pool(scheduler).num_gpu_blocks - 1,
        "the size that the next three are parts of",
        unit="blocks",
    ),
    Series(
        "cached_blocks",
        "gauge",
        "Blocks in which a prefix can be found",
        lambda scheduler: _tree(scheduler).num_cached,
        "a cache that never fills is larger than its working set",
        unit="blocks",
    ),
    Series(
        "idle_blocks",
        "gauge",
        "Cached blocks that no request uses now",
        lambda scheduler: _tree(scheduler).num_idle,
        "what can be evicted",
        unit="blocks",
    ),
    Series(
        "pinned_blocks",
        "gauge",
        "Idle blocks that waiting requests will find; they are evicted last",
        lambda scheduler: _tree(scheduler).num_pinned_idle,
        "what the queue needs of the cache; near `idle_blocks`, the cache is too small "
        "for the queue",
        unit="blocks",
    ),
    Series(
        "tree_nodes",
        "gauge",
        "Nodes of the radix tree",
        lambda scheduler: getattr(_tree(scheduler), "num_nodes", None),
        "how branched the traffic is",
        unit="nodes",
        only=_ONE_GROUP,
    ),
    Series(
        "resume_points",
        "gauge",
        "Places where requests can go on, with windows and states kept for it",
        lambda scheduler: getattr(_tree(scheduler), "num_points", None),
        "what of hybrid layers is kept",
        unit="points",
        only="several cache groups",
    ),
    # -- hints of clients ----------------------------------------------------------
    Series(
        "wishes",
        "gauge",
        "Paths that clients have asked to keep, by `radix_keep_for`, `radix_expect_in` "
        "or `radix_priority`",
        _wished("num_active"),
        "whether clients give such hints, and how many hold",
        unit="paths",
    ),
    Series(
        "wished_blocks",
        "gauge",
        "Blocks that tenants are charged for, because their wishes cover them",
        _wished("charged"),
        "near `hint_quota` times `vllm_radix:pool_blocks`, tenants lose wishes",
        unit="blocks",
    ),
    Series(
        "ended_wishes",
        "counter",
        "Wishes that hold no longer. time: it was over; used: the session came back; "
        "quota: it gave way to the quota; refused: it never held, for the quota; gone: "
        "its end left the cache; reset: with the whole cache",
        _wished("ended"),
        "`time` without `used`: sessions do not come back as expected; `quota` and "
        "`refused`: clients ask for more than `hint_quota` allows",
        unit="paths",
        label="reason",
        values=WISH_ENDS,
    ),
    # -- the order -----------------------------------------------------------------
    Series(
        "admissions",
        "counter",
        "Requests admitted for the first time, by why they were next. turn: the "
        "oldest; prefix: its prefix is cached; group: it opens a group; overtakes, "
        "wait, every, guard: the oldest, because that bound on overtaking was reached",
        _ordered("tally", "admissions"),
        "how often the order acts, and how often each bound of it fires",
        unit="requests",
        label="reason",
        values=ADMISSIONS,
        only=_ORDERED,
    ),
    Series(
        "overtakes",
        "histogram",
        "Later requests admitted before a request, at its admission",
        _ordered("tally", "overtakes"),
        "which requests pay for the order, and how much",
        unit="requests",
        buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
        only=_ORDERED,
    ),
    Series(
        "longest_overtaking",
        "gauge",
        "Later requests admitted before the one that waits and was overtaken most",
        _ordered("admission", "longest_overtaking"),
        "near `vllm_radix:max_overtakes`, the hard bound is about to act",
        unit="requests",
        only=_ORDERED,
    ),
    Series(
        "max_overtakes",
        "gauge",
        "The option `max_overtakes`: the most that longest_overtaking can become",
        _ordered("radix_config", "max_overtakes"),
        "to divide by",
        unit="requests",
        only=_ORDERED,
    ),
    Series(
        "longest_extra_wait_seconds",
        "gauge",
        "Time since the turn, first come, first served, of the oldest waiting request",
        _ordered("admission", "longest_extra_wait"),
        "near `vllm_radix:max_extra_wait_seconds`, the hard bound is about to act",
        unit="seconds",
        only=_ORDERED,
    ),
    Series(
        "max_extra_wait_seconds",
        "gauge",
        "The option `max_extra_wait`",
        _ordered("radix_config", "max_extra_wait"),
        "to divide by",
        unit="seconds",
        only=_ORDERED,
    ),
    Series(
        "held_requests",
        "gauge",
        "Waiting requests that are held until another has computed what they share",
        _ordered("admission", "num_held"),
        "many for long: long prompts in small chunks; see `hold`",
        unit="requests",
        only=_ORDERED,
    ),
    Series(
        "held_seconds",
        "histogram",
        "Time that admitted requests were held, of those that were",
        _ordered("tally", "held_seconds"),
        "what holds cost; what they save is in `hit_tokens`",
        unit="seconds",
        buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120),
        only=_ORDERED,
    ),
    Series(
        "ordering_seconds",
        "histogram",
        "Time to order the waiting requests before a step",
        _ordered("tally", "ordering_seconds"),
        "what the order costs the host, a step",
        unit="seconds",
        buckets=(
            *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
            *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
        ),
        only=_ORDERED,
    ),
):
    register(_series)
