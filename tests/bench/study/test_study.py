"""The studies: their arms, what they compare, and how they are started."""

import json
import subprocess
import sys

import pytest

from vllm_radix.config import RadixConfig
from vllm_radix.exits import ExitCode
from vllm_radix.policy import ORDERS
from vllm_radix_bench.replay import runner
from vllm_radix_bench.report.columns import records
from vllm_radix_bench.study import large, small
from vllm_radix_bench.study.results import by_load, ratio, tail_ratios


def run(load, seed, *, mean, p99, cold=None):
    arms = {
        name: {
            "ttft": {"mean": factor[0], "p99": factor[1]},
            "tenants": {} if cold is None else {"cold": {"max": factor[2]}},
            "computed_prompt_tokens": 100 * factor[0],
            "scheduler_cpu": 1.0,
        }
        for name, factor in (
            ("stock", (1.0, 1.0, 1.0)),
            ("prefix", (mean, p99, cold)),
        )
    }
    return {"load": load, "seed": seed, "arms": arms}


RUNS = [
    run("chat", 5, mean=0.5, p99=0.75),
    run("flood", 5, mean=0.5, p99=2.0, cold=0.25),
    run("chat", 6, mean=0.25, p99=1.25),
]


def test_the_small_study_knows_the_default_and_every_order():
    assert small.DEFAULT in small.arms()
    assert f"prefix {RadixConfig().patience:g}" == small.DEFAULT
    assert set(small.OTHERS) == set(ORDERS) - {"prefix"}


def test_arms_of_the_large_study_are_arms_of_a_replay():
    for name, text in large.ARMS.items():
        assert (runner.parse_arm(text).name == "stock") == (name == "stock")


def test_runs_are_compared_to_stock_load_by_load():
    chat, flood = by_load(RUNS)
    assert [one["seed"] for one in chat] == [5, 6]
    assert ratio(chat, "prefix", "ttft", "mean") == 0.375
    assert tail_ratios(chat, "prefix") == [0.75, 1.25]
    assert tail_ratios(flood, "prefix") == [0.25], "the cold tenant's longest"
    rows = records(large.columns(["prefix"]), [chat, flood])
    assert rows[0] == {
        "load": "chat",
        "prefix: mean / p99 (worst)": {"mean": 0.375, "p99": 1.0, "worst": 1.25},
        "prefix: tokens": 0.375,
        "CPU of prefix": 1.0,
    }


def test_a_study_is_run_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(large, "run_load", lambda task: RUNS[0])
    monkeypatch.setattr(
        "vllm_radix_bench.study.results.ProcessPoolExecutor", InThisProcess
    )
    output = tmp_path / "made" / "large.json"
    words = ["--loads", "few-shot at once", "--arms", "prefix", "--seeds", "5"]
    assert large.main([*words, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == [RUNS[0]]
    assert output.with_suffix(".csv").read_text().splitlines()[1].startswith("chat,0.5")
    assert "0.50 / 0.75 (0.75)" in capsys.readouterr().out
    assert {path.suffix for path in output.parent.iterdir()} == {".json", ".csv"}


@pytest.mark.parametrize(
    ("study", "suffix"), [(small, ".csv"), (small, ".png"), (large, ".csv")]
)
def test_an_output_is_not_one_of_the_files_beside_it(study, suffix, tmp_path, capsys):
    path = tmp_path / "made" / f"x{suffix}"
    with pytest.raises(SystemExit) as stop:
        study.main(["--output", str(path)])
    assert stop.value.code == ExitCode.INPUT
    assert f"error: --output: {path} is also where" in capsys.readouterr().err
    assert not path.parent.exists()


@pytest.mark.parametrize("study", [small, large])
def test_what_cannot_be_written_ends_a_study_before_its_work(
    study, tmp_path, monkeypatch, capsys
):
    def no_work(*anything):
        raise AssertionError("it began")

    monkeypatch.setattr(study, "collect", no_work)
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(SystemExit) as stop:
        study.main(["--output", str(tmp_path / "x.json")])
    assert stop.value.code == ExitCode.OUTPUT
    said = f": --output: {tmp_path / 'x.csv'} is a folder, not a file\n"
    assert capsys.readouterr().err.endswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("lost", [".json", ".csv"])
def test_a_result_that_went_elsewhere_is_told_by_the_exit_code(
    lost, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "large.json"

    def run_load(task):
        output.with_suffix(lost).mkdir()
        return RUNS[0]

    monkeypatch.setattr(large, "run_load", run_load)
    monkeypatch.setattr(
        "vllm_radix_bench.study.results.ProcessPoolExecutor", InThisProcess
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ["--loads", "few-shot at once", "--arms", "prefix", "--seeds", "5"]
    assert large.main([*words, "--output", str(output)]) == ExitCode.OUTPUT
    said = f"--output: {output.with_suffix(lost)} cannot be written"
    assert said in capsys.readouterr().err
    assert len(list(tmp_path.glob(f"large-*{lost}"))) == 1


class InThisProcess:
    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


@pytest.mark.parametrize("name", ["small", "large", "hybrid", "engines", "scale"])
@pytest.mark.parametrize("command", ["study {}", "study.{}"])
def test_all_are_commands(name, command):
    words = command.format(name).split()
    done = subprocess.run(
        [sys.executable, "-m", f"vllm_radix_bench.{words[0]}", *words[1:], "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert f"python -m vllm_radix_bench.study.{name}" in done.stdout
