"""Figures, intervals, answers and gates of the A/B on numbers made by hand."""

import itertools
import math
import random

import pytest

from vllm_radix_bench.ab import answers, figures, plan
from vllm_radix_bench.ab.gates import Gate
from vllm_radix_bench.ab.scrape import counts, hit_rate, parse, thinned
from vllm_radix_bench.ab.servers import ARMS
from vllm_radix_bench.report.cli_types import InputError


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Over many draws of five noisy rounds the true ratio is mostly inside."""
    rng = random.Random(1)
    inside = 0
    for _ in range(1500):
        ratios = [0.5 * math.exp(rng.gauss(0, 0.1)) for _ in range(5)]
        low, high = figures.interval(ratios)
        assert low <= high
        inside += low <= 0.5 <= high
    assert 0.93 < inside / 1500 < 0.97


def test_equal_rounds_have_no_spread_and_few_rounds_no_interval():
    assert figures.interval([0.5] * 5) == pytest.approx((0.5, 0.5))
    assert figures.interval([0.5] * 4) is None
    assert figures.interval([0.5, 0.4, 0.0, 0.5, 0.5]) is None


def run_with(ttft, seconds=2.0, **more):
    base = {"ttft": ttft, "tpot": [], "e2e": ttft, "seconds": seconds}
    base["counts"] = {name: 0 for name in figures.COUNTS}
    return {**base, **more}


def test_a_figure_is_compared_by_pairs():
    rounds = [
        {"stock": run_with([1.0, 3.0]), "radix": run_with([1.0, 1.0], seconds=1.0)},
        {"stock": run_with([4.0, 4.0]), "radix": run_with([2.0, 2.0])},
        {"stock": run_with([3.0, 3.0]), "radix": run_with([1.5, 1.5])},
    ]
    mean = figures.compare(figures.TIMES["ttft_mean"], rounds)
    assert (mean["stock"], mean["radix"]) == (3.0, 1.5)
    assert mean["ratio"] == pytest.approx(0.5) and mean["low"] is None
    assert mean["rounds"] == pytest.approx([0.5] * 3)
    rate = figures.compare(figures.TIMES["throughput"], rounds)
    assert rate["rounds"] == pytest.approx([2, 1, 1]) and rate["better"] == "higher"
    assert figures.compare(figures.TIMES["tpot_mean"], rounds) is None
    assert figures.compare(figures.TIMES["ttft_max"], rounds)["stock"] == 3.0
    two = figures.compare(figures.TIMES["ttft_mean"], rounds[:2])
    assert two["ratio"] is None and two["stock"] == 3.0, "a ratio of two drifts"


def test_noise_is_an_interval_beside_one():
    assert figures.is_noisy({"low": 1.1, "high": 1.2})
    assert not figures.is_noisy({"low": 0.9, "high": 1.2})
    assert not figures.is_noisy({"low": None, "high": None})
    assert not figures.is_noisy(None)


def record(name, output, top=None, error=""):
    return {"id": name, "output": output, "top": top or [], "error": error}


def near(token, other, gap):
    return [[[token, -0.1], [other, -0.1 - gap]]] * 3


def test_answers_differ_beyond_doubt_only_where_the_model_was_decided():
    stock = [
        record("0", [1, 2, 3], near(2, 9, 1e-4)),
        record("0.0", [5, 5, 5]),
        record("1", [1, 2, 3], near(2, 9, 1.0)),
        record("2", [1, 2, 3], near(2, 8, 1e-4)),
        record("3", [1]),
        record("4", [1], error="failed"),
    ]
    radix = [
        record("0", [1, 9, 3]),
        record("0.0", [7]),  # has another prompt
        record("1", [1, 9, 3]),
        record("2", [1, 9, 3]),  # neither of the two likeliest
        record("3", [1]),
        record("4", [1]),
    ]
    found = answers.compare(stock, radix, gap=1e-3)
    assert (found["compared"], found["different"]) == (4, 3)
    doubt = {one["id"]: one["beyond_doubt"] for one in found["differences"]}
    assert doubt == {"0": False, "1": True, "2": True}
    assert found["beyond_doubt"] == 2
    assert all(one["at"] == 1 for one in found["differences"])


def test_texts_without_probabilities_are_no_verdict():
    found = answers.compare([record("0", [1, 2])], [record("0", [1])], gap=1e-3)
    assert found["different"] == 1 and found["beyond_doubt"] == 0
    assert found["differences"][0] == {
        "id": "0", "at": 1, "gap": None, "beyond_doubt": None,
    }  # fmt: skip


def test_the_gap_is_that_of_the_type():
    assert answers.gap_of("torch.float32") == answers.gap_of("float32") == 1e-3
    assert answers.gap_of("bfloat16") > answers.gap_of("float16") > 1e-3
    assert answers.gap_of("") == answers.gap_of("bfloat16")


def workload(name, ratio, control=False, computed=(100, 50)):
    times = {"ttft_p99": {"ratio": ratio}}
    both = {
        arm: {**dict.fromkeys(figures.COUNTS, 0), "computed_tokens": tokens}
        for arm, tokens in zip(ARMS, computed, strict=True)
    }
    cell = {"blocks": None, "rate": None}
    made = {"name": name, "is_control": control, "times": times, "counts": both}
    return {**made, "cell": cell}


def held(text, *workloads):
    return [fine for fine, _ in Gate.parse(text).check(workloads)]


def test_a_gate_is_for_each_workload_but_the_control():
    all_of_them = workload("a", 1.2), workload("b", 1.0), workload("control", 2.0, True)
    assert held("ttft_p99>1.1", *all_of_them) == [False, True]
    assert held("control:ttft_p99 > 1.1", *all_of_them) == [False]
    assert held("b:ttft_p99>=1", *all_of_them) == [False]
    assert held("computed_tokens>0.5", *all_of_them) == [True, True]
    assert held("computed_tokens<=0.5", *all_of_them) == [False, False]
    # From none to some is infinitely more.
    assert held("computed_tokens>2", workload("a", 1, computed=(0, 5))) == [False]
    assert held("computed_tokens<1", workload("a", 1, computed=(0, 5))) == [True]
    # What was to be measured, and was not, holds nothing.
    missing = {"name": "c", "is_control": False, "cell": workload("c", 1)["cell"]}
    found = list(Gate.parse("c:ttft_p99>9").check([], [missing]))
    assert [fine for fine, _ in found] == [False] and "not measured" in found[0][1]
    assert held("preemptions>1", workload("a", 1)) == [True]
    # A workload's name may hold a colon.
    assert Gate.parse("bench: x:ttft_p99>1").load == "bench: x"


@pytest.mark.parametrize(
    "text", ["", "ttft_p99", "ttft_p99>", "ttft_p99=1", "x>1", "ttft_p99>-1"]
)
def test_a_wrong_gate_is_refused(text):
    with pytest.raises(InputError, match="--fail-on"):
        Gate.parse(text)


def test_pieces_take_turns():
    cells = plan.cells(2, [None], [None])
    order = list(plan.pieces(cells, 2, True, set()))
    assert [(p.round, p.cell, p.arm) for p in order[:4]] == [
        (0, 0, "stock"), (0, 0, "radix"), (0, 1, "radix"), (0, 1, "stock"),
    ]  # fmt: skip
    for number in (0, 1):
        first = [p.arm for p in order if p.cell == number][::2]
        assert set(first) == set(ARMS), "one arm always goes first"
    alone = list(plan.pieces(cells, 4, False, set()))
    starts = 1 + sum(a.arm != b.arm for a, b in itertools.pairwise(alone))
    assert starts == 6, "servers are started more often than needed"
    assert len(alone) == len(set(alone)) == 2 * 5 * 2
    done = {(0, 0), (1, 1)}
    left = list(plan.pieces(cells, 2, True, done))
    assert {(p.cell, p.round) for p in left} == {(0, 1), (0, 2), (1, 0), (1, 2)}


def test_caches_are_run_one_after_the_other():
    cells = plan.cells(2, [10, 20], [None, 2.0])
    sizes = [cells[p.cell].blocks for p in plan.pieces(cells, 3, True, set())]
    assert sizes == sorted(sizes)


METRICS = """
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0",model_name="a b"} %d
vllm:prompt_tokens_total{engine="1",model_name="a b"} 5
vllm:prompt_tokens_cached_total{engine="0"} %d
vllm:prefix_cache_queries_total{engine="0"} %d
vllm:prefix_cache_hits_total{engine="0"} %d
vllm:cache_config_info{engine="0",num_gpu_blocks="64",block_size="16"} 1
"""


def test_counts_are_what_grew_over_all_engines():
    before, after = parse(METRICS % (10, 1, 10, 1)), parse(METRICS % (110, 41, 60, 26))
    found = counts(before, after)
    assert found["prompt_tokens"] == 100 and found["cached_tokens"] == 40
    assert found["computed_tokens"] == 60 and found["hit_rate"] == 0.4
    assert found["preemptions"] == 0
    assert hit_rate(before, after) == 0.5 and hit_rate(before, before) is None
    assert after.labels_of("vllm:cache_config_info")[0]["block_size"] == "16"


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(float(i), i / 1000) for i in range(1000)]
    kept = thinned(points, 100)
    assert len(kept) <= 100 and kept[-1] == points[-1]
    assert kept == sorted(kept) and thinned(points[:5], 100) == points[:5]
