"""The study of eviction policies: its loads, its yardstick, and its tables."""

import json

import pytest

from vllm_radix.exits import ExitCode
from vllm_radix_bench.study import eviction
from vllm_radix_bench.workloads.eviction_loads import LOADS, draw, from_trace


def trace_of(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def line(ids, length, output, at=0):
    return {
        "timestamp": at,
        "input_length": length,
        "output_length": output,
        "hash_ids": ids,
    }


@pytest.mark.parametrize("name", LOADS)
def test_loads_are_drawn_from_their_seed(name):
    assert draw(name, 0, 50) == draw(name, 0, 80)[:50]
    first = draw(name, 0, 50)
    assert (first == draw(name, 1, 50)) is False
    assert all(one.prompt and min(one.prompt) >= 0 for one in first)
    assert max(max(one.prompt) for one in first) < 2**31


def test_answers_of_a_trace_are_what_the_next_turn_goes_on_with(tmp_path):
    path = trace_of(
        tmp_path,
        line([0, 1, 2], 1200, 900),
        line([0, 5], 1024, 10),
        line([0, 1, 3, 4, 6], 2400, 10),
    )
    requests, size = from_trace(eviction.load(path, eviction.words))
    assert size == 512
    assert [one.prompt for one in requests] == [[0 + 1000, 1001], [1000, 1005],
                                                [1000, 1001, 1003, 1004]]  # fmt: skip
    # 2,100 tokens fill four blocks: two of them are its answer's.
    assert requests[0].answer == [1003, 1004]
    assert requests[1].answer == []
    assert requests[0].prompt_tokens == 1200 and requests[0].output_tokens == 900


@pytest.mark.parametrize("load", LOADS)
def test_hit_density_is_not_behind_least_recently_used(load):
    """Nor ahead of the best there is."""
    cell = eviction.Cell(load, 7, 400, 0.15)
    policies = ("lru", "hit-density")
    run = eviction.run_cell((cell, policies))
    lru, learned = (run["hit_rates"][policy] for policy in policies)
    assert learned >= lru - eviction.MARGIN / 100
    assert max(lru, learned) <= run["best"] + 1e-9
    assert run["classes"]


def test_the_command_writes_its_tables(tmp_path, capsys):
    output = tmp_path / "eviction.json"
    path = trace_of(
        tmp_path, *(line([0, 1 + n % 5], 1024, 20, 1000 * n) for n in range(40))
    )
    words = ["--loads", "scan", "--requests", "120", "--jobs", "1"]
    words += ["--policies", "hit-density", "--trace", str(path)]
    words += ["--tokens", "2048", "--output", str(output)]
    assert eviction.main(words) == ExitCode.GOOD
    runs = json.loads(output.read_text())
    assert [run["load"] for run in runs] == ["scan"] * 4 + ["trace"]
    assert runs[-1]["blocks"] == 4
    assert set(runs[0]["hit_rates"]) == {"lru", "hit-density"}
    assert output.with_suffix(".csv").read_text().count("\n") == 6
    said = capsys.readouterr().out
    assert "hit-density: " in said and "points below lru at 0 of 5 points" in said


def test_the_concurrent_part_replays_the_trace(tmp_path):
    path = trace_of(
        tmp_path, *(line([0, 1 + n % 5], 1024, 20, 1000 * n) for n in range(12))
    )
    cell = eviction.Cell("trace", 0, None, tokens=4096, trace=path, concurrent=1.0)
    run = eviction.run_cell((cell, ("lru", "hit-density")))
    assert 0 < run["hit_rates"]["lru"] < 1
    assert run["ttft"]["hit-density"]["mean"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrent"], "--concurrent: needs --trace"),
        (["--loads"], "--loads: name one, or give --trace"),
        (["--trace", "missing.jsonl"], "--trace: "),
        (["--loads", "lop"], "invalid choice: 'lop'"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        eviction.main(words)
    assert stopped.value.code == ExitCode.INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
