"""What a result is said to show."""

import io

import pytest
from rich.console import Console

from vllm_radix_bench.ab.offline import report
from vllm_radix_bench.ab.offline.runner import differences
from vllm_radix_bench.report import columns


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
        "engine": {"groups": [["FullAttentionSpec", 32]]},
        "preemptions": 0,
        "seconds": 2.0,
        "records": records,
    }
    return {**made, **fields}


def cell(name, pressure, stock, radix, seconds=((2.0, 2.0),), p99=(0.2, 0.2)):
    runs = {
        arm: [
            run(count, seconds=pair[number], records=records(p99[number]))
            for pair in seconds
        ]
        for number, (arm, count) in enumerate((("stock", stock), ("radix", radix)))
    }
    return {"workload": name, "asked": pressure, "pressure": pressure, "runs": runs}


def records(ttft):
    return [
        {"id": str(i), "ttft": ttft, "steps_to_first_token": i, "output": [1, 2, 3]}
        for i in range(2)
    ]


OPTIONS = {"block_size": 32, "radix": {"policy": "prefix", "max_overtakes": 16}}


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


def shown(counts, texts=(), width=200):
    result = {"counts": list(counts), "texts": list(texts), "options": OPTIONS}
    out = Console(file=io.StringIO(), width=width, markup=False)
    fine = report.show(result, out)
    return fine, out.file.getvalue()


def headline(*counts, texts=()):
    return report.headline(report.rows_of({"counts": list(counts)}), list(texts))


def test_everything_is_printed():
    counts = [cell("chat", 4.0, 90, 45), cell("control", 4.0, 90, 90)]
    fine, text = shown(counts, [texts_of(run(50), run(50))])
    assert fine
    assert "chat texts: 2 of 2 equal to stock's" in text
    assert "90 → 45" in text and "0.500" in text


HYBRID = [["MambaSpec", 528], ["FullAttentionSpec", 528]]


def test_a_cache_of_several_groups_is_told():
    plain = cell("chat", 4.0, 90, 80)
    result = {"options": OPTIONS, "counts": [plain], "texts": []}
    assert list(report.groups_of(result)) == []
    first = plain["runs"]["stock"][0]
    first["engine"] = {}
    assert list(report.groups_of(result)) == [], "of an earlier version"
    first["engine"] = {"groups": [["FullAttentionSpec", 64]]}
    assert len(list(report.groups_of(result))) == 1
    first["engine"] = {"groups": HYBRID}
    (sentence,) = report.groups_of(result)
    assert "MambaSpec of 528, FullAttentionSpec of 528 tokens" in sentence
    assert sentence.endswith("one group of blocks of 32.")
    assert sentence in " ".join(shown([plain], width=400)[1].split())


PAIRS = ((2.0, 1.0), (2.0, 1.5), (2.0, 1.8))


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (1, "Times are not compared: one pair of runs says nothing about them"),
        (2, "Times are not compared: 2 pairs of runs say nothing about them"),
    ],
)
def test_few_pairs_give_no_ratio_of_times(pairs, sentence):
    _, text = shown([cell("chat", 4.0, 90, 45, seconds=PAIRS[:pairs])])
    assert sentence in text and "--repeats 3 or more" in text
    assert "TTFT" not in text and "requests/s" not in text
    (row,) = records_of(cell("chat", 4.0, 90, 45, seconds=PAIRS[:pairs]))
    assert row["requests/s"]["ratio"] is None


def records_of(*cells):
    return columns.records(report.COLUMNS, report.rows_of({"counts": list(cells)}))


def test_three_pairs_give_a_range():
    control = cell("control", 4.0, 90, 90, seconds=((2, 2.1), (2, 1.9), (2, 2)))
    _, text = shown([cell("chat", 4.0, 90, 45, seconds=PAIRS), control])
    assert "1.33 (1.11-2.00)" in text and "noise" not in text


def test_times_are_noise_where_the_control_shows_a_difference_too():
    cells = [cell("chat", 4.0, 90, 45, seconds=PAIRS)]
    cells.append(cell("chat", 0.5, 90, 90, seconds=PAIRS))
    cells.append(cell("control", 4.0, 90, 90, seconds=PAIRS))
    cells.append(cell("control", 0.5, 90, 90, seconds=((2, 2.1), (2, 1.9), (2, 2))))
    _, text = shown(cells)
    assert text.count("1.33 (1.11-2.00) noise") == 2, "chat and control at 4x"
    assert "noise: the control, which shares nothing, shows a difference" in text
    noise = [row["requests/s"]["noise"] for row in records_of(*cells)]
    assert noise == [True, False, True, False]
    _, text = shown(cells[:2])
    assert "Without the control workload it is not known which times" in text


def test_the_sentence_is_of_the_counts_under_pressure():
    cells = [cell("chat", 4.0, 5000, 3000), cell("agents", 4.0, 760, 729)]
    cells += [cell("chat", 0.5, 90, 90), cell("control", 4.0, 90, 90)]
    said = headline(*cells, texts=[texts_of(run(50), run(50))])
    assert said == (
        "radix computed 35 % fewer prompt tokens (5,760 → 3,729) on chat, agents with "
        "a working set of 4x the cache; median wait 0 → 0 steps; greedy texts equal: "
        "2 of 2."
    )


def test_without_pressure_the_sentence_is_of_what_there_is():
    assert "as many prompt tokens (90 → 90) on chat with a working set of 0.5x" in (
        headline(cell("chat", 0.5, 90, 90), cell("control", 0.5, 80, 80))
    )
    assert "0.50 % more prompt tokens (200 → 201) on control" in (
        headline(cell("control", 4.0, 200, 201))
    )


def test_a_worse_p99_is_named():
    worse = cell("chat", 4.0, 90, 45)
    for record in worse["runs"]["radix"][0]["records"]:
        record["steps_to_first_token"] += 360
    said = headline(worse, cell("few-shot", 4.0, 90, 45))
    assert "; p99 got worse: chat at 4x (1 → 361 steps)." in said
    slow = cell("chat", 4.0, 90, 45, seconds=PAIRS, p99=(0.2, 0.5))
    assert "TTFT" not in headline(slow), "what is noise is not known"
    control = cell("control", 4.0, 90, 90, seconds=PAIRS)
    said = headline(slow, control)
    assert "; p99 got worse: chat at 4x (TTFT 2.50 times stock's)." in said


def test_percentiles():
    assert report.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report.percentile([1.0], 0.99) == 1.0
    assert report.percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)


@pytest.mark.parametrize(
    ("radix", "other"),
    [
        ({}, True),
        ({"patience": 0.5}, True),
        ({"patience": 0.0}, False),
        ({"max_overtakes": 0}, False),
        ({"max_extra_wait": 0.0}, False),
        ({"policy": "fcfs"}, False),
    ],
)
def test_an_order_that_is_stocks_need_not_compute_less(radix, other):
    assert report.reorders({"options": {"radix": radix}}) == other
