"""The figures that ``top`` shows, each computed from one page or two."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from vllm_radix.metrics.series import BOUNDS, REASONS
from vllm_radix_bench.top.scrape import Page

Number = float | None


class Reading(Protocol):
    """Returns the sum of a sample, or None where there is none."""

    def __call__(self, name: str, **labels: str) -> Number:
        """Return the sum of a sample of that name and labels."""


@dataclass(frozen=True)
class Figure:
    """A figure of a server.

    Attributes:
        title: its name.
        value: computes it from sums of counters: of all, or of what is new.
        format: template of ``str.format``.
        is_count: whether it counts things; what is new is then told for a second.
        is_rare: whether its row is left out while it is 0.
    """

    title: str
    value: Callable[[Reading], Number]
    format: str = "{:,.0f}"
    is_count: bool = True
    is_rare: bool = False


@dataclass(frozen=True)
class State:
    """How something stands now.

    Attributes:
        title: its name.
        value: computes it from a page, for the engine of the labels or for all.
        format: template of ``str.format``, of it and of ``of``.
        of: computes what it is a part of, if it is.
    """

    title: str
    value: Callable[..., Number]
    format: str = "{:,.0f}"
    of: Callable[..., Number] | None = None


def _count(title: str, name: str, **labels: str) -> Figure:
    return Figure(title, lambda read: read(name, **labels))


def _rare(title: str, name: str, **labels: str) -> Figure:
    return replace(_count(title, name, **labels), is_rare=True)


def _ratio(title: str, part: str, whole: str) -> Figure:
    return Figure(title, lambda read: _share(read(part), read(whole)), "{:.1%}", False)


def _share(part: Number, whole: Number) -> Number:
    return part / whole if part is not None and whole else None


def _mean(title: str, name: str, factor: float, template: str) -> Figure:
    def value(read: Reading) -> Number:
        mean = _share(read(f"{name}_sum"), read(f"{name}_count"))
        return None if mean is None else mean * factor

    return Figure(title, value, template, False)


def _ahead(read: Reading) -> Number:
    ahead = [
        read("vllm_radix:admissions_total", reason=why) for why in ("prefix", "group")
    ]
    return None if None in ahead else sum(n for n in ahead if n is not None)


FIGURES: tuple[Figure, ...] = (
    _ratio(
        "prefix cache hit rate",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
    ),
    _count("prompt tokens", "vllm:prompt_tokens_total"),
    _count("generated tokens", "vllm:generation_tokens_total"),
    _count("hit tokens", "vllm:prefix_cache_hits_total"),
    _count("  inside blocks", "vllm_radix:hit_tokens_total", where="inside"),
    *(
        _rare(f"missed: {why}", "vllm_radix:missed_tokens_total", reason=why)
        for why in REASONS[:-1]
    ),
    _count("evicted blocks", "vllm_radix:evicted_blocks_total", reason="room"),
    _mean("  idle before, mean", "vllm_radix:evicted_idle_seconds", 1, "{:,.1f} s"),
    _count("requests admitted", "vllm_radix:admissions_total"),
    Figure("  ahead of their turn", _ahead),
    *(
        _rare(f"  bound: {bound}", "vllm_radix:admissions_total", reason=bound)
        for bound in BOUNDS
    ),
    _mean("overtaken, mean", "vllm_radix:overtakes", 1, "{:,.2f}"),
    _mean("held, mean", "vllm_radix:held_seconds", 1, "{:,.2f} s"),
    _mean("ordering, mean", "vllm_radix:ordering_seconds", 1e3, "{:,.2f} ms"),
    _mean("time to first token", "vllm:time_to_first_token_seconds", 1, "{:,.2f} s"),
    _rare("preemptions", "vllm:num_preemptions_total"),
)


def _sum(name: str) -> Callable[..., Number]:
    return lambda page, **labels: page.sum(name, **labels)


def _most(name: str) -> Callable[..., Number]:
    return lambda page, **labels: page.most(name, **labels)


STATES: tuple[State, ...] = (
    State("requests running", _sum("vllm:num_requests_running")),
    State("requests waiting", _sum("vllm:num_requests_waiting")),
    State("  held", _sum("vllm_radix:held_requests")),
    State("KV cache in use", _most("vllm:kv_cache_usage_perc"), "{:.1%}"),
    State(
        "blocks cached",
        _sum("vllm_radix:cached_blocks"),
        of=_sum("vllm_radix:pool_blocks"),
    ),
    State("  idle", _sum("vllm_radix:idle_blocks")),
    State("  pinned", _sum("vllm_radix:pinned_blocks")),
    State("tree nodes", _sum("vllm_radix:tree_nodes")),
    State("resume points", _sum("vllm_radix:resume_points")),
    State(
        "longest overtaking",
        _most("vllm_radix:longest_overtaking"),
        of=_most("vllm_radix:max_overtakes"),
    ),
    State(
        "longest extra wait",
        _most("vllm_radix:longest_extra_wait_seconds"),
        "{:,.1f} s",
        of=_most("vllm_radix:max_extra_wait_seconds"),
    ),
)


def since_start(page: Page, figure: Figure, **labels: str) -> Number:
    """Return a figure since the server started."""
    return figure.value(lambda name, **more: page.sum(name, **more, **labels))


def lately(before: Page, page: Page, figure: Figure, **labels: str) -> Number:
    """Return a figure between two pages; of what is counted, for each second."""

    def new(name: str, **more: str) -> Number:
        now = page.sum(name, **more, **labels)
        then = before.sum(name, **more, **labels) or 0.0
        # Less than before: the server was started anew.
        return None if now is None else now - then if now >= then else now

    value = figure.value(new)
    seconds = page.at - before.at
    if value is None or not figure.is_count:
        return value
    return value / seconds if seconds > 0 else None
