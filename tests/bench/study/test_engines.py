"""The study of several engines: its cells, its runs, its tables."""

import json

import pytest
from bench.study.test_study import InThisProcess

from vllm_radix.exits import ExitCode
from vllm_radix_bench.report.columns import records
from vllm_radix_bench.routing import ROUTINGS
from vllm_radix_bench.study import engines
from vllm_radix_bench.study.results import by_load
from vllm_radix_bench.study.scale import simulate


def made_run(cell, rules, tokens=2000.0, fewest=1000):
    arm = {
        "requests": 10,
        "computed_prompt_tokens": tokens,
        "ttft": {"mean": 0.5, "p99": 2.0},
        "imbalance": {"tokens": 1.25},
    }
    radix = {**arm, "computed_prompt_tokens": tokens / 2}
    arms = {"stock": arm, "radix": radix}
    return {
        "load": cell.label,
        **{name: getattr(cell, name) for name in cell.__dataclass_fields__},
        "fewest": fewest,
        "routings": {rule: arms for rule in rules},
    }


CELL = engines.Cell("chat", 2, 0.8, 0.9, 0)


def test_a_cell_is_run_with_every_rule_on_both_schedulers():
    run = engines.run_cell((CELL, tuple(ROUTINGS)))
    assert run["load"] == "chat, 0.8x, load 0.9, 2 engines"
    assert list(run["routings"]) == list(ROUTINGS)
    for arms in run["routings"].values():
        assert list(arms) == ["stock", "radix"]
        for one in arms.values():
            assert sum(one["engines"]) == one["computed_prompt_tokens"]
            assert len(one["engines"]) == 2
            assert one["computed_prompt_tokens"] >= run["fewest"]
            assert set(one["ttft"]) == {"mean", "p99"}
    turn, history = (run["routings"][rule] for rule in ("round-robin", "history"))
    for arm in ("stock", "radix"):
        tokens = [one[arm]["computed_prompt_tokens"] for one in (turn, history)]
        assert tokens[1] < 0.8 * tokens[0], "what fits is found where it was sent"


def test_the_working_set_is_that_of_all_caches():
    runs = [
        engines.run_cell((engines.Cell("few-shot", n, 0.8, 0.0, 0), ("history",)))
        for n in (1, 3)
    ]
    for run, count in zip(runs, (1, 3), strict=True):
        assert run["fewest"] == pytest.approx(0.8 * 8192 * count, rel=0.25)


def test_the_largest_are_run_first():
    class Asked:
        workloads, engines, seeds = ["chat"], [2, 8], [0, 1]

    cells = engines.cells_of(Asked)
    assert len(cells) == 2 * 3 * 2
    assert [cell.engines for cell in cells] == [8] * 6 + [2] * 6
    assert cells[0].label == "chat, 4x, at once, 8 engines"


def test_tables_are_means_over_seeds():
    runs = [made_run(CELL, ["history"]), made_run(CELL, ["history"], 4000.0, 3000)]
    (row,) = by_load(runs)
    (tokens,) = records(engines.tokens_columns(["history"]), [row])
    assert tokens == {
        "load": CELL.label,
        "history": {"stock": 3.0, "radix": 1.5},
        "fewest": 2.0,
    }
    (times,) = records(engines.time_columns(["history"]), [row])
    assert times["TTFT, history"]["radix_p99"] == 2.0
    (balance,) = records(engines.balance_columns(["history"]), [row])
    assert balance["busiest, history"] == {"stock": 1.25, "radix": 1.25}
    (said,) = engines.sentences(runs, ["history"])
    assert (
        "history with radix: 0.83 times the fewest in the mean of 2 runs, 1.00" in said
    )


def test_the_command_writes_runs_in_the_order_of_the_table(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(engines, "run_cell", lambda task: made_run(*task))
    monkeypatch.setattr(
        "vllm_radix_bench.study.results.ProcessPoolExecutor", InThisProcess
    )
    output = tmp_path / "e.json"
    words = ["--engines", "2", "4", "--workloads", "chat", "few-shot"]
    words += ["--routing", "history", "round-robin"]
    assert engines.main([*words, "--output", str(output)]) == 0
    runs = json.loads(output.read_text())
    assert [run["load"] for run in runs[:3]] == [
        "few-shot, 0.8x, load 0.9, 2 engines",
        "few-shot, 0.8x, load 0.9, 4 engines",
        "few-shot, 4x, load 2, 2 engines",
    ]
    assert runs[-1]["load"] == "chat, 4x, at once, 4 engines"
    assert "2 → 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        engines.main(["--routing", "lru", "--output", str(output)])
    assert stop.value.code == ExitCode.INPUT
    assert "--routing: 'lru' is no rule" in capsys.readouterr().err


def test_a_simulated_run_is_one_of_the_study():
    run = simulate(2)
    assert run["engines"] == 2
    assert set(run["routings"]) == {"round-robin", "history", "events"}
