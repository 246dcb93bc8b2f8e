"""Several engines behind a routing rule: where requests go, what is computed, when."""

from dataclasses import asdict

import pytest
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_radix_bench.replay import oracles, runner
from vllm_radix_bench.replay.summary import summary
from vllm_radix_bench.routing import ROUTINGS, RoutingChoice, parse_routing
from vllm_radix_bench.routing.base import EngineLoad, Routing
from vllm_radix_bench.routing.round_robin import RoundRobin
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import FleetRun, StalledError
from vllm_radix_bench.workloads.encoders import words
from vllm_radix_bench.workloads.sizing import build
from vllm_radix_bench.workloads.turn import Turn, longest_path

ARMS = ("stock", "radix")
ALL = pytest.mark.parametrize("text", ROUTINGS)
COST = CostModel()


def tokens(seed, count):
    return [1000 * seed + i for i in range(count)]


def options(engines=2, **fields):
    fields = {"block_size": 16, "max_num_seqs": 4, **fields}
    return runner.Options([64], max_num_batched_tokens=512, engines=engines, **fields)


def fleet(roots, text, arm="radix", engines=2, choice=None, **fields):
    return runner.run_fleet(
        runner.parse_arm(arm),
        roots,
        64,
        options(engines, **fields),
        longest_path(roots),
        choice or parse_routing(text),
    )


def loaded(name, load=1.5, engines=2, seed=0, pressure=2):
    """Requests over time, more of them than caches hold."""
    made = build(
        name,
        words,
        num_blocks=64 * engines,
        block_size=16,
        pressure=pressure,
        seed=seed,
        scale=0.125,
    )
    runner.shuffle(made.roots, seed)
    runner.send_at_load(made.roots, load, seed, options(engines))
    return made.roots


def two_pairs(apart):
    """Two requests of one prefix, then two of another."""
    made = [
        Turn(tokens(group, 64) + tokens(9 + number, 16), 2)
        for number, group in enumerate((1, 1, 2, 2))
    ]
    for number, turn in enumerate(made):
        turn.arrival = number * apart
    return made


HALF = 64 + 16 + 64 + 16
"""Tokens of one pair, each request at another engine."""
PAIRED = 64 + 16 + 16
"""Tokens of one pair at one engine."""


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("text", "apart", "engines", "computed"),
    [
        ("round-robin", 1.0, [0, 1, 0, 1], 2 * HALF),
        ("round-robin", 0.0, [0, 1, 0, 1], 2 * HALF),
        # Idle engines are taken in turn, busy ones by what is in flight.
        ("least-queue", 1.0, [0, 1, 0, 1], 2 * HALF),
        ("least-queue", 0.0, [0, 1, 0, 1], 2 * HALF),
        ("history", 1.0, [0, 0, 1, 1], 2 * PAIRED),
        ("history", 0.0, [0, 0, 1, 1], 2 * PAIRED),
        # Two beginnings of 64 tokens whose hashes name different engines.
        ('prefix-hash:{"tokens": 64}', 1.0, [1, 1, 0, 0], 2 * PAIRED),
        ('prefix-hash:{"tokens": 64}', 0.0, [1, 1, 0, 0], 2 * PAIRED),
        ("events", 1.0, [0, 0, 1, 1], 2 * PAIRED),
        # In a burst engines have told nothing yet.
        ("events", 0.0, [0, 1, 0, 1], 2 * HALF),
    ],
)
def test_where_two_pairs_go_and_what_it_costs(arm, text, apart, engines, computed):
    roots = two_pairs(apart)
    outcome = fleet(roots, text, arm)
    assert [record.engine for record in outcome.records] == engines
    assert outcome.computed_prompt_tokens == computed
    assert oracles.infinite_cache(roots) == 2 * PAIRED
    hits = [record.cached_tokens for record in outcome.records]
    assert hits == ([0, 64, 0, 64] if computed == 2 * PAIRED else [0, 0, 0, 0])


@ALL
@pytest.mark.parametrize("arm", ARMS)
def test_one_engine_is_a_replay_of_one_engine(text, arm):
    roots = loaded("chat", engines=1)
    one = runner.run_arm(
        runner.parse_arm(arm), roots, 64, options(None), longest_path(roots)
    )
    routed = fleet(roots, text, arm, engines=1)
    assert [asdict(r) for r in routed.records] == [asdict(r) for r in one.records]
    found, wanted = summary(routed), summary(one)
    assert found.pop("imbalance") == {"requests": 1, "tokens": 1}
    (only,) = found.pop("engines")
    assert only["computed_prompt_tokens"] == one.computed_prompt_tokens
    assert found == wanted and wanted["hit_rate"] > 0.1


@ALL
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["few-shot", "chat"])
def test_sums_bounds_and_the_same_each_time(text, arm, name):
    roots = loaded(name, engines=3)
    runs = [fleet(roots, text, arm, engines=3) for _ in range(2)]
    first, second = (summary(run) for run in runs)
    assert first == second
    assert [asdict(r) for r in runs[0].records] == [asdict(r) for r in runs[1].records]
    for key in ("requests", "prompt_tokens", "computed_prompt_tokens", "engine_steps"):
        assert sum(one[key] for one in first["engines"]) == first[key]
    assert first["requests"] == sum(1 for _ in oracles.every_turn(roots))
    assert first["computed_prompt_tokens"] >= oracles.infinite_cache(roots)
    assert first["seconds"] == max(one["seconds"] for one in first["engines"])
    most = max(one["requests"] for one in first["engines"])
    assert first["imbalance"]["requests"] == pytest.approx(3 * most / first["requests"])
    for number, engine in enumerate(runs[0].engines):
        mine = [one for one in runs[0].records if one.engine == number]
        assert len(mine) == len(engine.records)
        assert {id(one) for one in mine} == {id(one) for one in engine.records}


@ALL
def test_turns_wait_for_their_answers_wherever_those_are(text):
    roots = loaded("documents", engines=2)
    outcome = fleet(roots, text)
    by_id = {record.id: record for record in outcome.records}
    turns = {name: turn for name, turn, _ in oracles.every_turn(roots)}
    followed = 0
    for name, record in by_id.items():
        parent = by_id.get(name.rpartition(".")[0])
        if parent is None:
            assert record.sent == turns[name].arrival
            continue
        followed += parent.engine != record.engine
        assert record.sent == parent.finished + turns[name].delay
        whole = parent.prompt_tokens + turns[parent.id].max_tokens
        assert record.prompt_tokens == whole + len(turns[name].tokens)
    assert followed or text in ("history", "events", "prefix-hash")


@pytest.mark.parametrize("arm", ARMS)
def test_the_mirror_of_events_is_what_caches_hold(arm):
    """Under pressure, with evictions, at the end of the run."""
    roots = loaded("few-shot", engines=2, pressure=4)
    rule = parse_routing("events").make(2)
    settings = options(2)
    longest = longest_path(roots)
    schedulers = [
        runner.scheduler_of(runner.parse_arm(arm), 64, settings, longest, True)
        for _ in range(2)
    ]
    FleetRun(schedulers, COST, rule).run(roots)
    for number, scheduler in enumerate(schedulers):
        pool = scheduler.kv_cache_manager.block_pool
        names = [one.block_hash for one in pool.blocks if one.block_hash is not None]
        # Radix marks what is not a whole block in a way of its own; no event tells it.
        hashes = [name for name in map(get_block_hash, names) if len(name) == 32]
        held = set(map(maybe_convert_block_hash, hashes))
        assert len(held) > 30
        assert set(rule._known[number]) == held
        assert rule.holders.held[number] == len(held)


class Watching(RoundRobin):
    """Notes when it is asked what, and what engines told by then."""

    observe_every = 1.0
    seen: list

    def observe(self, loads):
        self.seen.append(("look", [load.running for load in loads]))

    def choose(self, prompt, salt, loads):
        self.seen.append((prompt[0], [load.in_flight for load in loads]))
        return super().choose(prompt, salt, loads)


def test_a_rule_looks_once_an_interval_and_before_what_comes_later(monkeypatch):
    monkeypatch.setattr(Watching, "seen", [], raising=False)
    slow = CostModel(seconds_per_step=0.4, flops_per_second=9e29, bytes_per_second=9e29)
    times = (0.5, 1.5, 1.6, 3.2)
    roots = [Turn([number], 3, arrival=at) for number, at in enumerate(times)]
    fleet(roots, "", choice=RoutingChoice(Watching, {}), cost=slow)
    assert Watching.seen == [
        (0, [0, 0]),
        # The first has been running since 0.5 and ends at 1.7.
        ("look", [1, 0]),
        (1, [1, 0]),
        (2, [1, 1]),
        # At 1.7 the first engine had nothing; what it has by now it tells at 2.1.
        ("look", [0, 1]),
        ("look", [0, 0]),
        (3, [0, 0]),
        ("look", [0, 1]),
    ]


class ToTheLast(Routing):
    """Sends to the last engine."""

    name = like = "last"

    def choose(self, prompt, salt, loads):
        return len(loads) - 1


def test_an_engine_that_stops_is_an_error_not_a_hang(monkeypatch):
    rule = RoutingChoice(ToTheLast, {}).make(2)
    schedulers = [
        runner.scheduler_of(runner.parse_arm("stock"), 64, options(2), 100)
        for _ in range(2)
    ]
    monkeypatch.setattr(schedulers[1], "schedule", SchedulerOutput.make_empty)
    roots = [Turn(tokens(1, 20), 2), Turn(tokens(2, 20), 2, arrival=5.0)]
    with pytest.raises(StalledError, match="2 requests wait and none is scheduled"):
        FleetRun(schedulers, COST, rule).run(roots)


def test_loads_are_what_is_in_flight_at_the_end():
    rule = parse_routing("least-queue").make(2)
    schedulers = [
        runner.scheduler_of(runner.parse_arm("radix"), 64, options(2), 100)
        for _ in range(2)
    ]
    run = FleetRun(schedulers, COST, rule)
    run.run(two_pairs(0.0))
    assert run._loads == [EngineLoad(), EngineLoad()]
