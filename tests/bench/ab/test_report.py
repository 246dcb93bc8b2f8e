"""What a result is said to show."""

import io

import pytest
from rich.console import Console

from vllm_radix_bench.ab import report
from vllm_radix_bench.ab.runner import differences


def run(computed, requests=2, outputs=None, tops=None, **fields):
    records = [
        {
            "id": str(i),
            "ttft": 0.1 * (i + 1),
            "steps_to_first_token": i,
            "output": (outputs or {}).get(str(i), [1, 2, 3]),
            **({"top": tops} if tops else {}),
        }
        for i in range(requests)
    ]
    made = {
        "requests": requests,
        "prompt_tokens": 100,
        "cached_tokens": 100 - computed,
        "computed_prompt_tokens": computed,
        "engine_steps": 7,
        "preemptions": 0,
        "seconds": 2.0,
        "records": records,
    }
    return {**made, **fields}


def cell(name, pressure, stock, radix):
    runs = {"stock": [run(stock)], "radix": [run(radix)]}
    return {"workload": name, "pressure": pressure, "runs": runs}


OPTIONS = {"radix": {"policy": "prefix", "max_overtakes": 16}}


def verdict(*counts, texts=(), options=OPTIONS):
    result = {"counts": list(counts), "texts": list(texts), "options": options}
    return [fine for fine, _ in report.verdicts(result)]


@pytest.mark.parametrize(
    ("given", "fine"),
    [
        (("chat", 4.0, 90, 80), True),
        (("chat", 4.0, 90, 90), False),
        (("chat", 0.5, 90, 90), True),
        (("chat", 0.5, 90, 80), True),
        (("chat", 0.5, 90, 92), False),
        (("chat", 1.1, 90, 90), True),
        (("chat", 1.1, 90, 92), False),
        (("control", 4.0, 90, 90), True),
        (("control", 4.0, 900, 895), True),
        (("control", 4.0, 90, 89), False),
        (("control", 0.5, 90, 91), False),
    ],
)
def test_verdicts(given, fine):
    assert verdict(cell(*given)) == [fine]


@pytest.mark.parametrize("radix", [{"policy": "fcfs"}, {"max_overtakes": 0}])
def test_stock_s_own_order_need_not_win(radix):
    assert verdict(cell("chat", 4.0, 90, 90), options={"radix": radix}) == [True]
    assert verdict(cell("chat", 4.0, 90, 92), options={"radix": radix}) == [False]


def test_counts_that_vary_are_a_miss():
    one = cell("chat", 4.0, 90, 80)
    one["runs"]["stock"].append(run(91))
    one["runs"]["radix"].append(run(80))
    assert verdict(one) == [True, False]


def texts_of(stock, radix):
    return {
        "workload": "chat",
        "pressure": 2.0,
        "differences": differences(stock, radix),
        "runs": {"stock": [stock], "radix": [radix]},
    }


TIE = [[[2, -0.5], [4, -0.5]]] * 3
CLEAR = [[[2, -0.1], [4, -2.5]]] * 3
OTHER = [[[2, -0.5], [7, -0.5]]] * 3


@pytest.mark.parametrize(
    ("tops", "fine"), [(TIE, True), (CLEAR, False), (OTHER, False)]
)
def test_a_difference_is_fine_only_where_the_model_is_undecided(tops, fine):
    stock = run(50, tops=tops)
    radix = run(50, outputs={"1": [1, 4, 3]}, tops=tops)
    part = texts_of(stock, radix)
    (found,) = part["differences"]
    assert (found["id"], found["at"], found["stock"], found["radix"]) == ("1", 1, 2, 4)
    assert found["gap"] == pytest.approx(2.4 if tops is CLEAR else 0)
    assert verdict(texts=[part]) == [fine]
    assert report.compared(part) == (1, 2)


def test_what_follows_a_difference_has_another_prompt_and_is_not_compared():
    stock, radix = run(50), run(50, outputs={"0": [9, 9, 9]})
    for one, output in ((stock, [5]), (radix, [6])):
        one["records"].append({**one["records"][0], "id": "0.0", "output": output})
        one["records"].append({**one["records"][0], "id": "0.0.0", "output": output})
        one["requests"] = 4
    part = texts_of(stock, radix)
    assert [d["id"] for d in part["differences"]] == ["0"]
    assert report.compared(part) == (1, 2)


def test_everything_is_printed():
    counts = [cell("chat", 4.0, 90, 45), cell("control", 4.0, 90, 90)]
    texts = [texts_of(run(50), run(50))]
    result = {"counts": counts, "texts": texts, "options": OPTIONS}
    console = Console(file=io.StringIO(), width=200)
    assert report.show(result, console)
    text = console.file.getvalue()
    assert "Stock computes more prompt tokens than radix: chat 2.0x" in text
    assert "greedy texts equal: 2 of 2" in text
    assert "90 → 45" in text and "0.500" in text


def test_percentiles():
    assert report.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report.percentile([1.0], 0.99) == 1.0
    assert report.percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)
