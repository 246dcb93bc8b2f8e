"""`replay --engines`: what it prints and writes, and what it refuses."""

import csv
import json

import pytest
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.routing import DEFAULT_ROUTINGS, ROUTINGS

SIZES = ["--block-size", "16", "--blocks", "64", "--max-num-seqs", "4"]
SIZES += ["--max-num-batched-tokens", "512"]
WORKLOAD = ["--workload", "few-shot", "--pressure", "1.5", "--stretch", "0.125"]


Strange = type(
    "Strange",
    (SchedulerInterface,),
    dict.fromkeys(SchedulerInterface.__abstractmethods__, len),
)
"""A scheduler that is complete, and none of vLLM's."""


class Deaf(Scheduler):
    """A scheduler that tells no events."""

    def __init__(self, *, vllm_config, **options):
        if vllm_config.kv_events_config is not None:
            raise ValueError("mine tells no events.")
        super().__init__(vllm_config=vllm_config, **options)


class Broken(Scheduler):
    """A scheduler that cannot be made."""

    def __init__(self, **options):
        raise AttributeError("no such name")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "r.json"


def run(output, *words):
    assert main(["replay", *SIZES, *words, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_every_rule_is_compared_in_one_run(output, tmp_path, capsys):
    words = [*WORKLOAD, "--load", "1.2", "--engines", "2", "--routing", *ROUTINGS]
    words += ["--blocks", "64", "128"]
    table = tmp_path / "r.csv"
    result = run(output, *words, "--csv", str(table))
    assert [(cell["blocks"], cell["routing"]) for cell in result["cells"]] == [
        (blocks, rule) for blocks in (64, 128) for rule in ROUTINGS
    ]
    for cell in result["cells"]:
        assert set(cell["arms"]) == {"stock", "radix"}
        for name, arm in cell["arms"].items():
            assert len(arm["engines"]) == 2
            assert arm["computed_prompt_tokens"] >= result["infinite_cache"]
            rows = cell["requests"][name]
            at = result["request_columns"].index("engine")
            counts = [sum(row[at] == e for row in rows) for e in (0, 1)]
            assert counts == [one["requests"] for one in arm["engines"]]
        assert "known_in_advance" not in cell
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(result["rows"]) == 2 * len(ROUTINGS) * 2
    assert {row["routing"] for row in rows} == set(ROUTINGS)
    assert all(float(row["x fewest"]) >= 1 for row in rows)
    shown = capsys.readouterr().out
    assert "routing CPU, ms/request" in rows[0]
    assert "With 64 blocks an engine and history, radix computed" in shown
    best = min(result["rows"][: 2 * len(ROUTINGS)], key=lambda r: r["tokens computed"])
    said = f"engines {best['routing']} and {best['arm']} computed least: "
    assert f"{said}{best['tokens computed']:,} tokens" in shown
    again = run(output, *words)
    for one in (result, again):
        one.pop("machine")
        for row in one["rows"]:
            del row["scheduler CPU, ms/request"], row["routing CPU, ms/request"]
    assert again == result


def test_without_rules_the_simplest_and_the_routers_are_run(output, capsys):
    result = run(output, *WORKLOAD, "--engines", "3")
    shown = " ".join(capsys.readouterr().out.split())
    assert " GB) in each of 3 engines." in shown
    assert "With 64 blocks in each of 3 engines " in shown
    found = [cell["routing"] for cell in result["cells"]]
    assert found == list(DEFAULT_ROUTINGS)
    # The working set is that of three caches.
    one = run(output, *WORKLOAD, "--no-oracle")
    assert result["infinite_cache"] > 2 * one["infinite_cache"]


def test_one_engine_is_not_told_of_as_several(output, capsys):
    run(output, *WORKLOAD, "--engines", "1", "--routing", "history")
    shown = " ".join(capsys.readouterr().out.split())
    assert "engines" not in shown.partition("Cost model")[2]
    assert "With 64 blocks history and radix computed least:" in shown
    assert shown.count("each distinct prefix once)") == 1


def test_a_closed_loop_goes_on_wherever_it_was_answered(output, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "token_ids": [*range(1000 * s, 1000 * s + 64 * (turn + 1))],
            "output_length": 4,
            "session": str(s),
            "arrival": 0.0,
        }
        for turn in range(3)
        for s in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    words = [str(trace), "--closed-loop", "--engines", "2"]
    result = run(output, *words, "--routing", "round-robin", "history")
    for cell in result["cells"]:
        rows = cell["requests"]["radix"]
        engines = {name: engine for name, *_, engine in rows}
        assert sorted(engines) == sorted(
            f"{s}{rest}" for s in range(4) for rest in ("", ".0", ".0.0")
        )
        if cell["routing"] == "history":
            assert all(engines[name] == engines[name[0]] for name in engines)
            hits = {name: cached for name, _, _, cached, *_ in rows}
            assert all(hits[f"{s}.0"] >= 48 for s in range(4))


def test_a_run_that_was_stopped_goes_on(output, monkeypatch, capsys):
    words = ["replay", *SIZES, *WORKLOAD, "--engines", "2", "--output", str(output)]
    from vllm_radix_bench.replay import runner

    fleet, done = runner.run_fleet, []

    def limited(arm, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arm.name)
        return fleet(arm, *rest)

    monkeypatch.setattr(runner, "run_fleet", limited)
    assert main(words) == ExitCode.INTERRUPTED
    monkeypatch.setattr(runner, "run_fleet", fleet)
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--engines", "3"])
    assert "--engines was 2, is 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--routing", "history"])
    said = '--routing was ["round-robin", "history"], is ["history"]'
    assert said in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert "3 of 4 pieces" in capsys.readouterr().err
    whole = json.loads(output.read_text())
    assert main(words) == 0
    fresh = json.loads(output.read_text())
    assert fresh["cells"] == whole["cells"]


HERE = "bench.replay.test_engines."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--routing", "history"], "--routing: it is for --engines N, which is not"),
        (["--engines", "0"], "'0' is not a whole number from 1 to 1024"),
        (["--engines", "2", "--routing", "lru"], "--routing: 'lru' is no rule; allo"),
        (
            ["--engines", "2", "--routing", 'history:{"match": 2}'],
            "--routing: 'match' of history is 2; allowed: a number from 0 to 1",
        ),
        (
            ["--engines", "2", "--html", "page.html"],
            "--html: a replay of several engines has no page; allowed: --output and",
        ),
        (
            ["--engines", "2", "--routing", "events", "--layout", "full+swa:64"],
            "--routing: events reads events of one group of full attention",
        ),
        (
            ["--engines", "2", "--no-oracle"],
            "--no-oracle: a replay of several engines has no best order to skip; allo",
        ),
        (
            ["--engines", "2", "--routing", f"history:{'[' * 100_000}"],
            " has no JSON object after the colon",
        ),
        (
            ["--engines", "2", "--arms", f"radix:{'[' * 100_000}"],
            "--radix takes nothing or a JSON object such as",
        ),
        (
            ["--engines", "2", "--routing", "events", "--arms", f"{HERE}Deaf"],
            f"--arms: '{HERE}Deaf' with the routing events: mine tells no events.",
        ),
        (
            ["--engines", "2", "--arms", "stock", f"{HERE}Broken"],
            f"--arms: '{HERE}Broken': it cannot be made (AttributeError: no such name)",
        ),
        (
            ["--engines", "1024", "--pressure", "5", "--blocks", "25000"],
            (
                "--engines: 1,024 caches of 25,000 blocks at a --pressure of 5 make a "
                "workload of 128,000,000; allowed: up to 1,000,000 blocks in all, for "
                "which a run takes about 5 GB: fewer --engines, or smaller caches, or"
            ),
        ),
        (
            ["--engines", "1001", "--pressure", "0.5", "--blocks", "2", "1000"],
            "--engines: 1,001 caches of 1,000 blocks have 1,001,000; allowed: up to",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, output, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["replay", "--output", str(output), *SIZES, *WORKLOAD, *words])
    assert stop.value.code == ExitCode.INPUT
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.parent.exists()


def test_a_scheduler_that_is_not_derived_from_vllms_is_refused(output, capsys):
    arm = "bench.replay.test_engines.Strange"
    words = ["--arms", "stock", arm, "--engines", "2", "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(["replay", *SIZES, *WORKLOAD, *words])
    assert stop.value.code == ExitCode.INPUT
    assert f"--arms: '{arm}' with --engines; allowed:" in capsys.readouterr().err
    assert not output.parent.exists()
