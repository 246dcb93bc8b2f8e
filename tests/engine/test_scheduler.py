"""The radix scheduler on the engine double: right reads, order, bounds, ends."""

import random

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from support.engine_double import EngineDouble, WrongReadError, make_scheduler
from support.prompts import grouped, prompt
from support.traffic import PRESSED, ROOMY, serve
from vllm_radix import RadixScheduler
from vllm_radix.engine.lookups import PrefixLookups
from vllm_radix.engine.scheduler import AsyncRadixScheduler
from vllm_radix.policy import StepCapacity


def test_the_class_follows_the_configuration():
    assert type(make_scheduler()) is RadixScheduler
    made = make_scheduler(asynchronous=True)
    assert type(made) is AsyncRadixScheduler
    assert isinstance(made, AsyncScheduler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_under_pressure_it_computes_less_and_answers_the_same(asynchronous):
    prompts = grouped(groups=8, members=6)
    options = {**PRESSED, "asynchronous": asynchronous}
    stock = AsyncScheduler if asynchronous else Scheduler
    theirs = serve(prompts, stock, **options)
    ours = serve(prompts, RadixScheduler, **options)
    assert ours.outputs == theirs.outputs
    assert len(ours.outputs) == len(prompts)
    assert ours.computed < 0.5 * theirs.computed


@pytest.mark.parametrize(
    ("prompts", "options"),
    [
        (grouped(groups=3, members=4), ROOMY),
        ({str(i): prompt(i, 150) for i in range(30)}, PRESSED),
    ],
    ids=["everything fits", "nothing is shared"],
)
def test_where_nothing_can_be_gained_it_is_stock(prompts, options):
    theirs, ours = serve(prompts, Scheduler, **options), serve(prompts, **options)
    assert ours.admitted == theirs.admitted == list(prompts)
    assert ours.steps == theirs.steps
    assert ours.computed == theirs.computed
    assert ours.outputs == theirs.outputs


def test_the_fcfs_policy_keeps_stock_order_under_pressure():
    prompts = grouped(groups=8, members=6)
    ours = serve(prompts, radix={"policy": "fcfs"}, **PRESSED)
    assert ours.admitted == list(prompts)


def test_zero_overtakes_is_first_come_first_served():
    prompts = grouped(groups=8, members=6)
    ours = serve(prompts, radix={"max_overtakes": 0}, **PRESSED)
    assert ours.admitted == list(prompts)


@pytest.mark.parametrize("bound", [1, 5, 16])
def test_no_request_is_overtaken_more_often_than_allowed(bound):
    prompts = grouped(groups=8, members=8)
    ours = serve(prompts, radix={"max_overtakes": bound}, **PRESSED)
    arrival = {request_id: i for i, request_id in enumerate(prompts)}
    most = max(
        sum(arrival[other] > arrival[request_id] for other in ours.admitted[:place])
        for place, request_id in enumerate(ours.admitted)
    )
    assert 0 < most <= bound
    assert sorted(ours.admitted) == sorted(prompts)


def test_a_flood_of_one_prefix_cannot_starve_a_cold_request():
    """Fails for plain longest-prefix order, which serves the cold one last."""
    engine = EngineDouble(make_scheduler(radix={"max_overtakes": 10}, **PRESSED))
    hot = prompt("hot", 256)
    sent = 0
    engine.add("hot", hot + prompt("first", 20), max_tokens=2)
    engine.step()
    engine.add("cold", prompt("cold", 300), max_tokens=2)
    while "cold" not in engine.admitted:
        while len(engine.scheduler.waiting) < 8:
            sent += 1
            engine.add(f"hot {sent}", hot + prompt(sent, 20), max_tokens=2)
        engine.step()
        assert sent < 100
    assert engine.admitted.index("cold") <= 1 + 10


def test_salts_and_adapters_never_share():
    engine = EngineDouble(make_scheduler(**ROOMY))
    tokens = prompt("same", 130)
    adapters = [LoRARequest(name, i + 1, f"/{name}") for i, name in enumerate("ab")]
    engine.add("plain", tokens)
    engine.add("salt 1", tokens, cache_salt="one")
    engine.add("salt 2", tokens, cache_salt="two")
    engine.add("lora a", tokens, lora_request=adapters[0])
    engine.add("lora b", tokens, lora_request=adapters[1])
    engine.run()
    assert set(engine.cached.values()) == {0}
    engine.add("salt 1 again", tokens, cache_salt="one")
    engine.add("lora b again", tokens, lora_request=adapters[1])
    engine.run()
    assert engine.cached["salt 1 again"] == engine.cached["lora b again"] == 128


def test_prompt_logprobs_skip_the_lookup_and_still_publish():
    engine = EngineDouble(make_scheduler(**ROOMY))
    tokens = prompt("same", 130)
    engine.add("first", tokens)
    engine.run()
    engine.add("logprobs", tokens, prompt_logprobs=1)
    engine.run()
    engine.add("after", tokens)
    engine.run()
    assert engine.cached == {"first": 0, "logprobs": 0, "after": 128}


def test_preemption_reads_right_and_answers_the_same():
    prompts = {str(i): prompt(i, 100) for i in range(6)}
    options = {"num_blocks": 18, "max_num_seqs": 6, "max_num_batched_tokens": 512}
    theirs = serve(prompts, Scheduler, max_tokens=90, **options)
    ours = serve(prompts, max_tokens=90, **options)
    assert ours.resumed and ours.resumed == theirs.resumed
    assert ours.outputs == theirs.outputs
    assert ours.steps == theirs.steps


def test_reset_with_running_requests():
    engine = EngineDouble(make_scheduler(**ROOMY))
    for request_id, tokens in grouped(2, 3).items():
        engine.add(request_id, tokens, max_tokens=8)
    engine.step()
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.tree.stats().cached_blocks == 0
    engine.run()
    assert len(engine.outputs) == 6
    assert all(len(tokens) == 8 for tokens in engine.outputs.values())


def test_evicted_blocks_are_unreachable_until_computed_again():
    engine = EngineDouble(make_scheduler(**ROOMY))
    tokens = prompt("same", 130)
    engine.add("first", tokens)
    engine.run()
    manager = engine.scheduler.kv_cache_manager
    second = manager.block_pool.tree.match(
        manager.block_pool.keys.key(engine.add("again", tokens), 4)
    ).blocks[1]
    manager.evict_blocks({second})
    engine.run()
    assert engine.cached["again"] == 32
    engine.add("third", tokens)
    engine.run()
    assert engine.cached["third"] == 128


def test_a_request_forgotten_while_waiting_leaves_nothing_behind():
    engine = EngineDouble(make_scheduler(**PRESSED))
    for request_id, tokens in grouped(8, 4).items():
        engine.add(request_id, tokens)
    for _ in range(3):
        engine.step()
    for request_id in [r.request_id for r in engine.scheduler.waiting]:
        engine.abort(request_id)
    engine.run()
    assert not engine.scheduler.admission.num_known
    assert not engine.scheduler.kv_cache_manager.block_pool.tree.pinned_blocks()


def test_requests_that_load_their_kv_count_as_admitted():
    """They take blocks and leave the queue without being scheduled."""
    engine = EngineDouble(make_scheduler(max_num_seqs=1))
    scheduler = engine.scheduler
    for name in ("running", "old", "loading", "young"):
        engine.add(name, prompt("same", 96) + prompt(name, 40))
        engine.step()
    (loading,) = (r for r in scheduler.waiting if r.request_id == "loading")
    scheduler.waiting.remove_request(loading)
    scheduler.kv_holding_waiting.add_request(loading)
    admission = scheduler.admission
    admission.end_step(SchedulerOutput.make_empty(), [loading], 0.0)
    assert admission.overtaken("old") == 1
    assert admission.overtaken("young") == 0
    assert admission.overtaken("loading") is None


@pytest.fixture
def looked_up(monkeypatch):
    """The requests that any scheduler looks up, as it does."""
    seen = []
    look_up = PrefixLookups.look_up

    def watched(self, entry):
        seen.append(entry.id)
        return look_up(self, entry)

    monkeypatch.setattr(PrefixLookups, "look_up", watched)
    return seen


def test_a_request_is_looked_up_again_when_the_cache_concerns_it(looked_up):
    engine = EngineDouble(make_scheduler(num_blocks=60, max_num_seqs=1))
    engine.add("first", prompt("group 0", 128), 20)
    engine.step()
    for request_id, tokens in grouped(8, 2).items():
        engine.add(request_id, tokens)
    capacity = StepCapacity(slots=1, tokens=256, blocks=20)
    admission = engine.scheduler.admission
    admission.plan_step(capacity, 0.0)
    assert len(looked_up) == 16
    admission.plan_step(capacity, 0.0)
    assert len(looked_up) == 16
    engine.add("new", prompt("new", 40))
    admission.plan_step(capacity, 0.0)
    assert looked_up[16:] == ["new"]
    # The first request's blocks fill up; nobody who waits goes on there.
    engine.step()
    admission.plan_step(capacity, 0.0)
    assert looked_up[17:] == []


def test_requests_that_share_nothing_are_looked_up_once(looked_up):
    engine = EngineDouble(make_scheduler(**PRESSED))
    for i in range(40):
        engine.add(str(i), prompt(i, 100))
    engine.run()
    assert len(looked_up) == len(set(looked_up)) <= 40


def test_a_cold_request_wakes_when_its_first_block_comes(looked_up):
    engine = EngineDouble(make_scheduler(num_blocks=40, max_num_seqs=2))
    engine.add("running", prompt("r", 40), 30)
    engine.step()
    engine.add("a", prompt("a", 100), 30)
    engine.add("b", prompt("b", 100))
    engine.add("a again", prompt("a", 100), cache_salt="other")
    engine.add("a once more", prompt("a", 100))
    engine.step()
    assert sorted(looked_up) == ["a", "a again", "a once more", "b"]
    engine.scheduler.admission._catch_up()
    assert looked_up[4:] == ["a once more"]


def test_a_subclass_must_fit_the_kind_of_scheduling():
    class Mine(RadixScheduler):
        pass

    assert type(make_scheduler(Mine)) is Mine
    with pytest.raises(ValueError, match="derive it from AsyncRadixScheduler"):
        make_scheduler(Mine, asynchronous=True)


def test_the_double_catches_a_wrong_read():
    """Plants the fault the double is for: a match that ignores the last block."""
    engine = EngineDouble(make_scheduler(**ROOMY), check=False)
    engine.add("first", prompt("a", 64) + prompt("b", 70))
    engine.run()
    pool = engine.scheduler.kv_cache_manager.block_pool
    right = pool.tree.match

    def wrong(key, *args, **kwargs):
        return right(engine_key, *args, **kwargs)

    engine_key = pool.keys.key(engine.add("probe", prompt("a", 64) + [4] * 70), 128)
    engine_key = engine_key[: 64 * 4] + bytes(4 * 64)
    first = engine.add("again", prompt("a", 64) + prompt("b", 70))
    engine_key = pool.keys.key(first, 128)
    pool.tree.match = wrong
    with pytest.raises(WrongReadError):
        engine.run()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_ends_once_and_reads_right(seed, asynchronous):
    """Adds, aborts, salts, branches and resets, under pressure."""
    rng = random.Random(seed)
    engine = EngineDouble(
        make_scheduler(
            num_blocks=30,
            max_num_seqs=5,
            max_num_batched_tokens=128,
            asynchronous=asynchronous,
            radix={"max_overtakes": rng.choice([0, 3, 50])},
        ),
        lag=int(asynchronous),
    )
    texts = [prompt(i, 200) for i in range(4)]
    aborted, alive = set(), {}
    for number in range(60):
        for _ in range(rng.randrange(4)):
            request_id = f"{number}-{len(alive)}"
            stem = rng.choice(texts)[: rng.randrange(1, 200)]
            tokens = stem + prompt(request_id, rng.randrange(1, 60))
            alive[request_id] = rng.randrange(1, 40)
            salt = rng.choice([None, None, "salt"])
            engine.add(request_id, tokens, alive[request_id], cache_salt=salt)
        if alive and rng.random() < 0.2:
            victim = rng.choice(list(alive))
            engine.abort(victim)
            aborted.add(victim)
        if rng.random() < 0.05 and not asynchronous:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.step()
    engine.run()
    for request_id, length in alive.items():
        got = len(engine.outputs.get(request_id, []))
        assert got == length or (request_id in aborted and got <= length)
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not pool.tree.stats().duplicate_blocks


@pytest.mark.parametrize("more", [True, False], ids=["goes on", "is closed"])
def test_a_streaming_session_is_queued_once(more):
    """Its next input, or its end, comes as a request of the same id."""
    engine = EngineDouble(make_scheduler())
    engine.add("session", prompt("a", 40), resumable=True)
    engine.add("session", prompt("b", 40) if more else [3], resumable=more)
    engine.add("other", prompt("a", 50))
    for _ in range(20):
        engine.step()
    assert len(engine.outputs["session"]) == 4 + 4 * more
    engine.abort("session")
    engine.run()
    assert len(engine.outputs["other"]) == 4
    scheduler = engine.scheduler
    assert not scheduler.admission.num_known
