"""What is counted, against recounts of what was seen to happen."""

from collections import Counter
from itertools import count

import pytest

from support.engine_double import EngineDouble, make_scheduler
from support.hybrid_double import HybridDouble, make_hybrid_scheduler
from support.prompts import grouped, prompt
from support.traffic import traffic
from vllm_radix import RadixScheduler
from vllm_radix.engine.miss_log import _COUNTED_AS, _PLACED, _WORDS
from vllm_radix.metrics.sampler import INTERVAL
from vllm_radix.metrics.series import ADMISSIONS, BOUNDS, REASONS, SERIES, WISH_ENDS

HYBRID = "full/16+swa:64/16x2"


class Ledger:
    """Collects the samples of an engine, and vLLM's statistics beside them."""

    def __init__(self, scheduler, step=0.05):
        ticks = count()
        scheduler.clock = lambda: next(ticks) * step
        self.scheduler, self.samples = scheduler, []
        self.steps, self.queries, self.hits = 0, 0, 0
        self.idle = set()
        original = scheduler.make_stats

        def make_stats(*args, **kwargs):
            stats = original(*args, **kwargs)
            if not (stats.num_running_reqs + stats.num_waiting_reqs):
                self.idle.add(self.steps)
            self.steps += 1
            self.queries += stats.prefix_cache_stats.queries
            self.hits += stats.prefix_cache_stats.hits
            self.samples.append(getattr(stats, "radix", None))
            return stats

        scheduler.make_stats = make_stats

    def totals(self):
        """Return the sums of all deltas that were sent, by metric."""
        totals = {}
        for sample in filter(None, self.samples):
            for name, new in (sample.counters | sample.histograms).items():
                before = totals.get(name, [0] * len(new))
                totals[name] = [a + b for a, b in zip(before, new, strict=True)]
        return {name: [round(n, 6) for n in one] for name, one in totals.items()}

    def counted(self):
        """Return the same as the engine has counted them."""
        tally, found = self.scheduler.tally, {}
        for name, series in SERIES.items():
            value = getattr(tally, name, None)
            if series.kind == "histogram":
                found[name] = [*value.counts, round(value.total, 6)]
            elif series.kind == "counter":
                found[name] = list(
                    value.values() if isinstance(value, dict) else [value]
                )
                found[name] = found[name][: len(series.values) or 1]
        return {name: one for name, one in found.items() if any(one)}


def watch_tree(pool):
    """Return a counter of the blocks that were cached and are not any more."""
    left = Counter()
    tree = pool.tree
    one_group = hasattr(tree, "insert")
    verbs = ["insert", "release"] if one_group else ["remove"]
    for name in ("evict", *verbs):
        original = getattr(tree, name)

        def watched(*args, _original=original, _name=name, **kwargs):
            gone = _original(*args, **kwargs)
            left[_name] += len(gone)
            return gone

        setattr(tree, name, watched)
    return left


@pytest.mark.parametrize("seed", range(8))
def test_hits_and_queries_are_stocks_and_the_requests_own(seed):
    ledgers = []
    engine = traffic(
        seed, requests=30, made=lambda e: ledgers.append(Ledger(e.scheduler))
    )
    (ledger,), tally = ledgers, engine.scheduler.tally
    assert tally.queried_tokens == ledger.queries > 0
    assert sum(tally.hit_tokens.values()) == ledger.hits == sum(engine.cached.values())


@pytest.mark.parametrize("seed", range(4))
def test_hits_and_queries_of_several_groups_are_too(seed):
    scheduler = make_hybrid_scheduler(RadixScheduler, HYBRID, 60)
    ledger, engine = Ledger(scheduler), HybridDouble(scheduler)
    shared = prompt(("shared", seed), 200)
    for number, cut in enumerate((200, 200, 150, 64, 190)):
        engine.add(f"{number}", shared[:cut] + prompt((seed, number), 30))
        engine.run()
    tally = scheduler.tally
    assert tally.queried_tokens == ledger.queries == 5 * 30 + 804
    found = sum(tally.hit_tokens.values())
    assert found == ledger.hits == sum(engine.cached.values()) > 0
    inside = sum(hit % 16 for hit in engine.cached.values())
    assert tally.hit_tokens["inside"] == inside


def test_hits_inside_blocks_are_told_apart():
    engine = EngineDouble(make_scheduler(block_size=32))
    text = prompt("a", 100)
    for name, tokens in (("new", text), ("part", text[:75]), ("same", text)):
        engine.add(name, tokens, 1)
        engine.run()
    # Three tokens more are not worth a copy.
    assert engine.cached == {"new": 0, "part": 74, "same": 96}
    assert engine.scheduler.tally.hit_tokens == {"block_end": 160, "inside": 10}


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_leave_are_counted_by_why(seed):
    left = []
    engine = traffic(
        seed, faults=False, made=lambda e: left.append(watch_tree(pool_of(e)))
    )
    (left,), counts = left, engine.scheduler.tally.evicted_blocks
    assert counts["room"] == left["evict"] > 0
    assert counts["duplicate"] == left["insert"] + left["release"]
    assert sum(engine.scheduler.tally.evicted_idle_seconds.counts) == counts["room"]
    cached = pool_of(engine).tree.num_cached
    assert counts["reset"] == 0
    engine.scheduler.reset_prefix_cache()
    assert counts["reset"] == cached > 0


def pool_of(engine):
    return engine.scheduler.kv_cache_manager.block_pool


def test_blocks_of_several_groups_that_leave_are_counted():
    scheduler = make_hybrid_scheduler(RadixScheduler, HYBRID, 40)
    engine = HybridDouble(scheduler)
    left = watch_tree(pool_of(engine))
    for number in range(8):
        engine.add(f"{number}", prompt(number, 150))
        engine.run()
    assert scheduler.tally.evicted_blocks["room"] == left["evict"] > 0


def test_the_idle_age_of_evicted_blocks():
    engine = EngineDouble(make_scheduler(block_size=32, num_blocks=6))
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    engine.add("first", prompt("first", 96), 1)
    engine.run()
    now[0] = 50.0
    engine.add("second", prompt("second", 150), 1)
    engine.run()
    ages = engine.scheduler.tally.evicted_idle_seconds
    assert ages.total == 50.0 * sum(ages.counts) > 0
    assert dict(zip((*SERIES["evicted_idle_seconds"].buckets, "more"), ages.counts,
                    strict=True))[100] == sum(ages.counts)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_overtakes_are_those_that_the_order_of_admission_shows(seed):
    engine = EngineDouble(
        make_scheduler(
            block_size=16, num_blocks=41, max_num_seqs=3, max_num_batched_tokens=128
        )
    )
    arrivals = {}
    for number, (name, tokens) in enumerate(grouped(6, 5, 160, 20 + seed).items()):
        arrivals[name] = number
        engine.add(name, tokens, 3)
        if number % 3 == seed % 3:
            engine.step()
    engine.run()
    expected = [
        sum(arrivals[before] > arrivals[name] for before in engine.admitted[:place])
        for place, name in enumerate(engine.admitted)
    ]
    tally = engine.scheduler.tally
    assert tally.overtakes.total == sum(expected) > 0
    assert sum(tally.overtakes.counts) == len(arrivals)
    assert tally.overtakes.counts[0] == expected.count(0)
    assert sum(tally.admissions.values()) == len(arrivals)
    assert tally.admissions["prefix"] + tally.admissions["group"] > 0


@pytest.mark.parametrize(
    ("radix", "bound"),
    [
        ({"patience": 0.0}, "guard"),
        ({"max_overtakes": 2, "patience": 1e6}, "overtakes"),
        ({"policy": "k-lpm"}, "every"),
        ({"max_extra_wait": 0.0, "patience": 1e6}, "wait"),
    ],
)
def test_each_bound_that_fires_is_counted(radix, bound):
    engine = EngineDouble(
        make_scheduler(
            block_size=16,
            num_blocks=41,
            max_num_seqs=3,
            max_num_batched_tokens=128,
            radix=radix,
        )
    )
    ticks = count()
    engine.scheduler.clock = lambda: next(ticks) * 0.01
    for name, tokens in grouped(6, 12, 160, 20).items():
        engine.add(name, tokens, 3)
    longest = 0
    while engine.scheduler.has_requests():
        engine.step()
        longest = max(longest, engine.scheduler.admission.longest_overtaking)
    assert engine.scheduler.tally.admissions[bound] > 0
    if bound == "overtakes":
        assert longest <= 2 + 3  # and those admitted in the same step


def test_held_requests_and_seconds_are_counted():
    engine = EngineDouble(
        make_scheduler(
            block_size=16,
            num_blocks=200,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            long_prefill_token_threshold=64,
        )
    )
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    shared = prompt("shared", 320)
    for number in range(4):
        engine.add(f"{number}", shared + prompt(number, 20), 2)
    seen = []
    while engine.scheduler.has_requests():
        engine.step()
        now[0] += 1.0
        seen.append(engine.scheduler.admission.num_held)
    held = engine.scheduler.tally.held_seconds
    assert max(seen) == sum(held.counts) == 3
    assert held.total >= 3 * 3.0


def test_wishes_of_clients_are_shown_and_counted():
    radix = {"hint_quota": 0.2}
    made = make_scheduler(block_size=16, num_blocks=61, radix=radix)
    ledger, engine = Ledger(made), EngineDouble(made)
    for name, hints in {
        "kept": {"radix_keep_for": 1000},
        "over at once": {"radix_keep_for": 0.1},
        "plain": {},
        "too long": {"radix_keep_for": 1000},
    }.items():
        length = 300 if name == "too long" else 80
        engine.add(name, prompt(name, length), 2, extra_args=hints)
        engine.run()
    gauges = ledger.samples[-1].gauges
    assert (gauges["wishes"], gauges["wished_blocks"]) == ([1], [5])
    ended = dict(zip(WISH_ENDS, ledger.totals()["ended_wishes"], strict=True))
    assert {why: n for why, n in ended.items() if n} == {"time": 1, "refused": 1}


def test_wishes_are_shown_with_several_cache_groups_too():
    made = make_hybrid_scheduler(RadixScheduler, HYBRID, 80, radix={"hint_quota": 0.5})
    ledger, engine = Ledger(made), HybridDouble(made)
    engine.add("kept", prompt("a", 80), 2, extra_args={"radix_keep_for": 1000})
    engine.run()
    gauges = ledger.samples[-1].gauges
    assert gauges["wishes"] == [1]
    assert gauges["wished_blocks"] > [4]


@pytest.mark.parametrize("seed", range(4))
def test_reasons_make_up_all_that_was_missed(seed):
    ledgers = []
    engine = traffic(
        seed,
        requests=30,
        faults=False,
        radix={"explain": True},
        made=lambda e: ledgers.append(Ledger(e.scheduler)),
    )
    tally = engine.scheduler.tally
    requests = sum(tally.lookups.values())
    hits = sum(tally.hit_tokens.values())
    assert hits + sum(tally.missed_tokens.values()) + requests == tally.queried_tokens
    assert tally.lookups["unseen"] > 0 and not tally.missed_tokens["complete"]
    radix = {"explain": True, "min_sub_block_tokens": 1}
    engine = EngineDouble(make_scheduler(radix=radix))
    for name in ("first", "again"):
        engine.add(name, prompt("same", 70), 1)
        engine.run()
    assert engine.scheduler.tally.lookups["complete"] == 1


def test_reasons_of_several_groups_make_up_all_that_was_missed():
    scheduler = make_hybrid_scheduler(
        RadixScheduler, HYBRID, 60, radix={"explain": True}
    )
    engine = HybridDouble(scheduler)
    shared = prompt("shared", 200)
    for number, cut in enumerate((200, 200, 150, 64, 190, 120, 120)):
        engine.add(f"{number}", shared[:cut] + prompt(number, 30))
        engine.run()
    tally = scheduler.tally
    missed = sum(tally.missed_tokens.values())
    assert sum(tally.hit_tokens.values()) + missed + 7 == tally.queried_tokens
    assert sum(tally.lookups.values()) == 7
    assert tally.lookups["unkept"] + tally.lookups["given_up"] > 0


def test_reasons_are_not_shown_where_they_are_not_known():
    scheduler = make_scheduler(RadixScheduler)
    for name in ("missed_tokens", "lookups"):
        assert SERIES[name].read(scheduler) is None
        explained = make_scheduler(RadixScheduler, radix={"explain": True})
        assert SERIES[name].read(explained) is not None


def test_every_reason_has_its_count():
    """One that is not in the list would end the engine."""
    assert set(ADMISSIONS) == set(_PLACED)
    assert set(REASONS) == {_COUNTED_AS.get(reason, reason) for reason in _WORDS}
    assert set(BOUNDS) < set(ADMISSIONS)


# -- samples -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_samples_lose_nothing_and_are_few(seed):
    ledgers = []
    engine = traffic(
        seed, faults=False, made=lambda e: ledgers.append(Ledger(e.scheduler))
    )
    (ledger,) = ledgers
    sent = sum(sample is not None for sample in ledger.samples)
    assert 1 < sent < ledger.steps / 2
    assert ledger.totals() == ledger.counted()
    assert engine.scheduler.tally.queried_tokens > 0


def test_samples_of_several_groups_lose_nothing():
    scheduler = make_hybrid_scheduler(RadixScheduler, HYBRID, 40)
    ledger, engine = Ledger(scheduler), HybridDouble(scheduler)
    for number in range(8):
        engine.add(f"{number}", prompt(number % 3, 150))
        engine.step()
    engine.run()
    assert ledger.totals() == ledger.counted()
    assert ledger.samples[-1].gauges["resume_points"][0] > 0
    assert "tree_nodes" not in ledger.samples[-1].gauges


def test_the_last_step_sends_what_is_left_at_once():
    scheduler = make_scheduler(RadixScheduler)
    ledger, engine = Ledger(scheduler, step=INTERVAL / 1e6), EngineDouble(scheduler)
    for name in ("a", "b"):
        engine.add(name, prompt(name, 70), 5)
        engine.run()
    sent = {at for at, sample in enumerate(ledger.samples) if sample is not None}
    # The first of all, and when nothing is left.
    assert sent == {0} | ledger.idle and {4, ledger.steps - 1} <= ledger.idle
    assert len(ledger.idle) < ledger.steps / 2
    assert ledger.totals() == ledger.counted()


def test_a_clock_that_is_set_back_stops_no_samples():
    scheduler = make_scheduler(RadixScheduler)
    ledger, engine = Ledger(scheduler), EngineDouble(scheduler)
    scheduler.clock = lambda: 1000.0
    engine.add("a", prompt("a", 70), 5)
    engine.step()
    scheduler.clock = lambda: 0.0
    engine.step()
    assert ledger.samples[1] is not None


def test_nothing_is_sent_when_statistics_are_off():
    scheduler = make_scheduler(RadixScheduler)
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = False
    engine = EngineDouble(scheduler)
    engine.add("a", prompt("a", 70), 2)
    assert scheduler.make_stats() is None
    engine.run()
    assert scheduler.make_stats() is None


def test_vllms_own_order_has_no_figures_of_an_order():
    scheduler = make_scheduler(RadixScheduler, radix={"policy": "fcfs"})
    ledger, engine = Ledger(scheduler), EngineDouble(scheduler)
    engine.add("a", prompt("a", 70), 2)
    engine.run()
    last = ledger.samples[-1]
    assert "held_requests" not in last.gauges and "cached_blocks" in last.gauges
    assert last.info["info"]["policy"] == "fcfs"


def test_counting_changes_no_step():
    """The same requests, with samples and without."""

    def run(sampled):
        def watch(engine):
            if sampled:
                Ledger(engine.scheduler, step=0.001)
                return
            engine.scheduler.clock = lambda: 0.0
            engine.scheduler.log_stats = False
            engine.scheduler.kv_cache_manager.log_stats = False

        engine = traffic(11, made=watch)
        return engine.outputs, engine.steps, engine.computed, engine.admitted

    assert run(sampled=True) == run(sampled=False)
