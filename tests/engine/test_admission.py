"""Hold, pins, bounds, fairness and the null cases, on the engine double."""

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from support.engine_double import EngineDouble, make_scheduler
from support.prompts import grouped, prompt
from support.traffic import PRESSED, ROOMY, serve
from vllm_radix import RadixScheduler
from vllm_radix.policy import ORDERS


class Grammar:
    """A structured output whose grammar is being compiled."""

    grammar = None


UNBOUNDED = {"max_overtakes": 10**9, "max_extra_wait": 1e9}


def same_prefix(count=16, shared=1024, own=40):
    prefix = prompt("long", shared)
    return {str(i): prefix + prompt(i, own) for i in range(count)}


def chunked(threshold, **radix):
    return {
        "num_blocks": 400,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": threshold,
        "radix": radix,
    }


# -- hold ----------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 256, 64])
def test_a_prefix_computed_in_chunks_is_computed_once(threshold):
    prompts = same_prefix()
    ideal = 1024 + 16 * (40 + 3)
    theirs = serve(prompts, Scheduler, **chunked(threshold))
    ours = serve(prompts, RadixScheduler, **chunked(threshold))
    assert ours.computed <= 1.02 * ideal
    assert theirs.computed > 1.4 * ideal or not threshold
    assert ours.outputs == theirs.outputs


def test_without_hold_followers_compute_the_same_chunks():
    ours = serve(same_prefix(), RadixScheduler, **chunked(64, hold=False))
    assert ours.computed > 3 * 1024


def held_engine(**radix):
    """A leader in the middle of its prefill, and followers that wait for it."""
    engine = EngineDouble(make_scheduler(**chunked(64, **radix)))
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    # Stock's threshold is for those who are not alone.
    engine.add("busy", prompt("busy", 40), max_tokens=40)
    engine.step()
    for request_id, tokens in same_prefix(5).items():
        engine.add(request_id, tokens)
    for _ in range(2):
        engine.step()
    assert engine.admitted == ["busy", "0"]
    return engine, now


@pytest.mark.parametrize("end", ["aborted", "preempted"])
def test_followers_go_on_when_their_leader_is_gone(end):
    engine, _ = held_engine()
    scheduler = engine.scheduler
    if end == "aborted":
        engine.abort("0")
    else:
        _, leader = scheduler.running
        scheduler.running.remove(leader)
        scheduler._preempt_request(leader, 0.0)
    engine.step()
    assert engine.admitted[2:3] == ["1"] or engine.resumed == ["0"]
    engine.run()
    others = {str(i): 4 for i in range(end == "aborted", 5)}
    assert {i: len(engine.outputs[i]) for i in others} == others


def test_who_may_not_be_overtaken_is_not_held():
    ours = serve(same_prefix(), RadixScheduler, **chunked(64, max_overtakes=0))
    assert ours.computed > 3 * 1024


def test_a_request_that_waits_for_a_grammar_holds_nobody():
    engine = EngineDouble(make_scheduler(**chunked(64)))
    engine.add("busy", prompt("busy", 40), max_tokens=40)
    engine.step()
    for request_id, tokens in same_prefix(3).items():
        engine.add(request_id, tokens, grammar=None if int(request_id) else Grammar())
    for _ in range(40):
        engine.step()
    assert engine.admitted == ["busy", "1", "2"]
    engine.abort("0")
    engine.run()


def test_nobody_is_held_longer_than_max_extra_wait():
    engine, now = held_engine(max_extra_wait=5.0)
    now[0] = 5.1
    engine.step()
    assert engine.admitted == ["busy", "0", "1", "2", "3", "4"]
    engine.run()


def test_another_prompt_is_not_held():
    engine, _ = held_engine()
    engine.add("other", prompt("other", 100))
    engine.step()
    assert engine.admitted == ["busy", "0", "other"]
    engine.run()
    assert sorted(engine.outputs) == ["0", "1", "2", "3", "4", "busy", "other"]


def test_a_follower_may_be_aborted_while_it_is_held():
    engine, _ = held_engine()
    engine.abort("2")
    engine.run()
    assert sorted(engine.outputs) == ["0", "1", "3", "4", "busy"]


def test_salted_and_uncached_requests_do_not_wait_for_each_other():
    engine = EngineDouble(make_scheduler(**chunked(64)))
    for i, tokens in enumerate(same_prefix(4).values()):
        engine.add(str(i), tokens, cache_salt=str(i))
    engine.step()
    assert engine.admitted == ["0", "1", "2", "3"]
    engine.run()


# -- null cases ----------------------------------------------------------------


@pytest.mark.parametrize("budget", [64, 100, 256])
def test_what_fits_takes_no_more_steps_for_holding(budget):
    """Who computes goes on, and publishes, before others are admitted."""
    prompts = same_prefix(6, shared=200)
    options = {**ROOMY, "max_num_batched_tokens": budget}
    radix = {"sub_block": False}
    theirs = serve(prompts, Scheduler, **options)
    ours = serve(prompts, radix=radix, **options)
    assert ours.steps == theirs.steps
    assert ours.computed == theirs.computed
    assert ours.admitted == theirs.admitted


@pytest.mark.parametrize("policy", [name for name in ORDERS if name != "fcfs"])
@pytest.mark.parametrize("threshold", [0, 64])
def test_what_fits_is_served_in_order(policy, threshold):
    prompts = grouped(groups=6, members=4, own=30)
    options = {**ROOMY, "long_prefill_token_threshold": threshold}
    theirs = serve(prompts, Scheduler, **options)
    ours = serve(prompts, radix={"policy": policy, "hold": False}, **options)
    assert ours.admitted == theirs.admitted
    assert ours.steps == theirs.steps
    assert ours.outputs == theirs.outputs


@pytest.mark.parametrize("policy", list(ORDERS))
def test_nothing_shared_is_stock_order_under_pressure(policy):
    lengths = [40, 300, 150, 90] * 8
    prompts = {str(i): prompt(i, length) for i, length in enumerate(lengths)}
    theirs = serve(prompts, Scheduler, **PRESSED)
    ours = serve(prompts, radix={"policy": policy}, **PRESSED)
    assert ours.admitted == theirs.admitted
    assert ours.steps == theirs.steps
    assert ours.computed == theirs.computed


# -- order ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_no_shared_prefix_is_computed_twice_when_nothing_is_cached_yet(slots):
    """Six groups wait, and the cache holds four of their prefixes."""
    prompts = grouped(groups=6, members=4)
    options = {"num_blocks": 21, "max_num_batched_tokens": 512}
    theirs = serve(prompts, Scheduler, max_num_seqs=slots, **options)
    radix = {"patience": 9.0}
    ours = serve(prompts, radix=radix, max_num_seqs=slots, **options)
    once = 6 * 128 + 24 * (20 + 3)
    assert ours.computed <= once < theirs.computed
    assert ours.outputs == theirs.outputs


@pytest.mark.parametrize("policy", [name for name in ORDERS if name != "fcfs"])
def test_every_order_answers_the_same_and_shares_more(policy):
    prompts = grouped(groups=8, members=6)
    theirs = serve(prompts, Scheduler, **PRESSED)
    ours = serve(prompts, radix={"policy": policy, **UNBOUNDED}, **PRESSED)
    assert ours.outputs == theirs.outputs
    assert ours.computed < 0.6 * theirs.computed


def test_what_does_not_fit_does_not_stop_what_does():
    """Stock's scan ends at the first request that finds no room."""
    engine = EngineDouble(make_scheduler(num_blocks=16, max_num_seqs=4))
    shared = prompt("shared", 64)
    engine.add("first", shared + prompt("a", 30), max_tokens=40)
    engine.add("running", prompt("long", 250), max_tokens=40)
    engine.step()
    engine.add("too long", prompt("b", 300))
    engine.add("fits", shared + prompt("c", 10))
    engine.step()
    assert engine.admitted == ["first", "running", "fits"]
    engine.run()
    assert len(engine.outputs) == 4


def test_the_oldest_goes_when_its_turn_is_long_ago():
    engine = EngineDouble(
        make_scheduler(radix={"max_extra_wait": 10.0, "policy": "lpm"}, **PRESSED)
    )
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    hot = prompt("hot", 256)
    engine.add("hot", hot + prompt("first", 20), max_tokens=2)
    engine.step()
    engine.add("cold", prompt("cold", 300), max_tokens=2)
    sent = 0
    while "cold" not in engine.admitted:
        while len(engine.scheduler.waiting) < 8:
            sent += 1
            engine.add(f"hot {sent}", hot + prompt(sent, 20), max_tokens=2)
        engine.step()
        now[0] += 1.0
        assert now[0] < 20
    assert now[0] > 10


@pytest.mark.parametrize(("policy", "starves"), [("prefix", False), ("lpm", True)])
def test_a_stream_of_one_prefix_holds_up_others_only_so_long(policy, starves):
    options = {"policy": policy, **UNBOUNDED}
    engine = EngineDouble(make_scheduler(radix=options, **PRESSED))
    hot = prompt("hot", 256)
    engine.add("hot", hot + prompt("first", 20), max_tokens=2)
    engine.step()
    colds = sent_hot = 0
    for sent in range(150):
        if sent % 30 == 0:
            colds += 1
            engine.add(f"cold {sent}", prompt(sent, 300), max_tokens=2)
        while len(engine.scheduler.waiting) < 12:
            sent_hot += 1
            engine.add(f"hot {sent_hot}", hot + prompt(f"h{sent_hot}", 20), 2)
        engine.step()
    served = sum(request_id.startswith("cold") for request_id in engine.admitted)
    assert (served == 0) if starves else (served >= colds - 1)


def test_requests_that_wait_for_a_grammar_stop_nobody():
    engine = EngineDouble(make_scheduler(**PRESSED))
    prompts = grouped(groups=8, members=4)
    slow = []
    for at, (request_id, tokens) in enumerate(prompts.items()):
        if at % 5:
            engine.add(request_id, tokens)
        else:
            slow.append(engine.add(request_id, tokens, grammar=Grammar()))
    for _ in range(30):
        engine.step()
    assert not {request.request_id for request in slow} & set(engine.admitted)
    assert len(engine.admitted) > 10
    for request in slow:
        request.structured_output_request = None
        request.status = RequestStatus.WAITING
    engine.run()
    assert sorted(engine.outputs) == sorted(prompts)


# -- pins ----------------------------------------------------------------------


def pinned(tree):
    return tree.pinned_blocks()


@pytest.mark.parametrize("policy", ["prefix", "lpm"])
def test_what_the_queue_needs_is_evicted_last(policy):
    radix = {"policy": policy, "max_overtakes": 0}
    engine = EngineDouble(make_scheduler(num_blocks=31, max_num_seqs=1, radix=radix))
    wanted = prompt("wanted", 128)
    engine.add("before", wanted)
    engine.run()
    for i in range(6):
        engine.add(f"cold {i}", prompt(i, 200))
    engine.add("next", wanted + prompt("n", 20))
    engine.run()
    assert engine.admitted[-1] == "next"
    assert engine.cached["next"] == (128 if policy == "prefix" else 0)
    assert not pinned(engine.scheduler.kv_cache_manager.block_pool.tree)


def test_a_reset_forgets_pins():
    prompts = grouped(groups=8, members=6)
    engine = EngineDouble(make_scheduler(**PRESSED))
    tree = engine.scheduler.kv_cache_manager.block_pool.tree
    for request_id, tokens in prompts.items():
        engine.add(request_id, tokens)
    while not pinned(tree):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not pinned(tree)
    engine.run()
    assert sorted(engine.outputs) == sorted(prompts)


def test_pins_never_make_a_request_wait():
    prompts = grouped(groups=8, members=6)
    theirs = serve(prompts, Scheduler, **PRESSED)
    ours = serve(prompts, **PRESSED)
    assert ours.outputs == theirs.outputs
    assert ours.steps <= theirs.steps


# -- fairness ------------------------------------------------------------------


@pytest.mark.parametrize("tenant", ["", "team"])
def test_a_tenant_that_sends_much_does_not_crowd_out_another(tenant):
    engine = EngineDouble(
        make_scheduler(
            num_blocks=41,
            max_num_seqs=1,
            radix={"tenant": tenant, "fair_quantum": 200},
        )
    )
    for i in range(20):
        engine.add(f"many {i}", prompt(i, 150), extra_args={"team": "a"})
    for i in range(3):
        engine.add(f"few {i}", prompt(f"f{i}", 150), extra_args={"team": "b"})
    engine.run()
    last = max(engine.admitted.index(f"few {i}") for i in range(3))
    assert last < 10 if tenant else last == 22


def test_debts_do_not_starve_a_tenant_among_ever_new_ones():
    engine = EngineDouble(
        make_scheduler(
            num_blocks=40,
            max_num_seqs=1,
            radix={"tenant": "cache_salt", "fair_quantum": 64, "max_overtakes": 9},
        )
    )
    for name in ("hog 1", "hog 2"):
        engine.add(name, prompt(name, 200), 1, cache_salt="hog")
    for i in range(60):
        engine.add(f"new {i}", prompt(i, 40), 1, cache_salt=f"salt {i}")
        engine.step()
    place = engine.admitted.index("hog 2")
    assert 1 < place <= 11
    engine.run()


def test_nothing_is_kept_of_requests_that_are_gone():
    options = {"num_blocks": 100, "radix": {"tenant": "cache_salt"}}
    engine = EngineDouble(make_scheduler(**options), check=False)
    admission = engine.scheduler.admission
    for i in range(50):
        for name in "ab":
            engine.add(f"{name} {i}", prompt(f"{name}{i}", 20), 1, cache_salt=f"{i}")
        engine.run()
    assert not admission.num_known
    assert not admission._new and not len(admission._lookups)
    assert not admission._tenants._num_waiting and not admission._grammars.ids()
    assert not admission._grammars._requests
    assert len(admission._rate._queue) <= 8
    assert len(admission._turns._times) <= 4
