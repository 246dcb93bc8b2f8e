"""Prefixes that a KV connector loads: order, holds and preemption beside them."""

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from support.loading_double import LoadingDouble
from support.prompts import grouped, prompt
from vllm_radix import RadixScheduler

SIZE = 32
ARMS = {"stock": Scheduler, "radix": RadixScheduler}


def run(cls, prompts, texts, steps, max_tokens=4, **options):
    double = LoadingDouble(cls, texts, steps, **{"num_blocks": 64, **options})
    for name, tokens in prompts.items():
        double.add(name, tokens, max_tokens)
    double.run()
    return double


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_what_is_loaded_in_stocks_order_is_what_stock_loads(steps):
    prompts = grouped(groups=3, members=4)
    texts = [prompts["0-0"], prompts["1-0"][:100]]
    stock = run(Scheduler, prompts, texts, steps)
    radix = run(RadixScheduler, prompts, texts, steps, radix={"policy": "fcfs"})
    assert radix.outputs == stock.outputs and len(radix.outputs) == 12
    assert radix.loaded == stock.loaded > 0
    assert (radix.loads, radix.computed) == (stock.loads, stock.computed)
    assert radix.copied == 0, "a connector knows whole blocks"


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("blocks", [14, 64])
def test_in_its_own_order_answers_are_the_same_and_no_more_is_computed(steps, blocks):
    prompts = grouped(groups=4, members=5)
    texts = [prompts["0-0"], prompts["2-3"]]
    stock = run(Scheduler, prompts, texts, steps, num_blocks=blocks)
    radix = run(RadixScheduler, prompts, texts, steps, num_blocks=blocks)
    assert radix.outputs == stock.outputs and len(radix.outputs) == 20
    assert radix.computed <= stock.computed
    assert radix.loaded <= stock.loaded and radix.loaded > 0


@pytest.mark.parametrize("arm", ARMS)
def test_who_comes_while_a_prefix_is_loaded_waits_instead_of_loading_it_again(arm):
    prompts = grouped(groups=1, members=5)
    double = LoadingDouble(ARMS[arm], [prompts["0-0"][:128]], 6, num_blocks=64)
    for name, tokens in prompts.items():
        double.add(name, tokens)
        double.step()
    double.run()
    assert double.computed == 5 * (20 + 3) and len(double.outputs) == 5
    if arm == "stock":
        assert (len(double.loads), double.loaded) == (5, 5 * 128)
    else:
        assert (double.loads, double.loaded) == (["0-0"], 128)


def test_others_go_on_while_something_is_loaded():
    prompts = {"loads": prompt("loads", 150), "goes": prompt("goes", 150)}
    radix = run(RadixScheduler, prompts, [prompts["loads"]], steps=8)
    assert radix.loads == ["loads"] and radix.computed_beside == 150
    assert radix.admitted == ["goes", "loads"]


def test_a_hold_behind_a_load_ends_with_the_bound_on_waiting():
    prompts = grouped(groups=1, members=2)
    double = LoadingDouble(
        RadixScheduler,
        [prompts["0-0"]],
        20,
        num_blocks=64,
        radix={"max_extra_wait": 3.0},
    )
    now, begun = 0.0, []
    double.scheduler.clock = lambda: now
    for name, tokens in prompts.items():
        double.add(name, tokens)
        double.step()
    for _ in range(10):
        now += 1.0
        double.step()
        begun.append(len(double.loads))
    assert begun[0] == 1 and begun[-1] == 2
    double.run()
    assert len(double.outputs) == 2


@pytest.mark.parametrize("arm", ARMS)
def test_requests_are_preempted_while_others_load_and_come_back(arm):
    prompts = {f"{n} says": prompt(f"says {n}", 64) for n in range(3)}
    loading = {f"{n} loads": prompt(f"loads {n}", 104) for n in range(6)}

    def answers(blocks):
        double = LoadingDouble(ARMS[arm], [*loading.values()], 15, num_blocks=blocks)
        for name, tokens in prompts.items():
            double.add(name, tokens, 80)
        for _ in range(20):
            double.step()
        for name, tokens in loading.items():
            double.add(name, tokens, 40)
            for _ in range(3):
                double.step()
        double.run()
        return double

    calm, tight = answers(200), answers(18)
    assert tight.outputs == calm.outputs and len(calm.outputs) == 9
    assert tight.preempted_beside > 0 and tight.resumed and not calm.resumed
    # One that was preempted is loaded again.
    assert len(tight.loads) > len(calm.loads) == 6


@pytest.mark.parametrize("arm", ARMS)
def test_a_load_that_fails_is_computed(arm):
    prompts = grouped(groups=2, members=3)
    double = LoadingDouble(
        ARMS[arm], [prompts["0-0"], prompts["1-0"]], 4, {"0-0", "1-1"}, num_blocks=64
    )
    for name, tokens in prompts.items():
        double.add(name, tokens)
    double.run()
    good = run(ARMS[arm], prompts, [prompts["0-0"], prompts["1-0"]], 4)
    assert double.outputs == good.outputs and len(double.outputs) == 6


@pytest.mark.parametrize("arm", ARMS)
def test_an_abort_while_loading_leaves_nothing_wrong_behind(arm):
    """The load goes on, into blocks that must not be another's before it ends."""
    prompts = grouped(groups=3, members=2, prefix=96, own=8)
    texts = [*prompts.values()]
    double = LoadingDouble(ARMS[arm], texts, 5, num_blocks=10)
    for name, tokens in prompts.items():
        double.add(name, tokens)
    double.step()
    (first, *_) = double.loads
    double.abort(first)
    double.run()
    assert set(double.outputs) == {*prompts} - {first}
    assert not double.scheduler.requests
