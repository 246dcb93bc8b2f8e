"""The study of hints: who is over, who errs, and its table."""

import json

import pytest

from vllm_radix.exits import ExitCode
from vllm_radix_bench.study import hints
from vllm_radix_bench.workloads.eviction_loads import Blocks


def line(ids, length, at):
    return {
        "timestamp": at,
        "input_length": length,
        "output_length": 20,
        "hash_ids": ids,
    }


def test_a_conversation_is_over_with_its_last_answer():
    requests = [Blocks(prompt, [], 1, 1) for prompt in ([1, 2], [1], [1, 2, 3], [])]
    assert hints.truly_over(requests) == {2, 3}


def test_a_third_of_all_say_the_opposite():
    over = set(range(0, 3000, 2))
    said = hints.with_errors(over, 3000, 0)
    assert said == hints.with_errors(over, 3000, 0) != hints.with_errors(over, 3000, 1)
    assert len(said ^ over) == pytest.approx(1000, rel=0.1)


def test_true_ends_are_worth_something_and_the_tables_are_written(tmp_path, capsys):
    # Three conversations go on; two prompts that nobody asks for again follow each.
    lines = []
    for turn in range(6):
        for number in range(3):
            begin = 100 + 10 * number
            talk = [number, *range(begin, begin + turn + 1)]
            lines.append(line(talk, 512 * len(talk), 0))
            for k in range(2):
                new = 1000 + 20 * turn + 6 * number + 3 * k
                lines.append(line([new, new + 1, new + 2], 1536, 0))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "hints.json"
    words = ["--trace", str(trace), "--tokens", str(512 * 20), "--output", str(output)]
    assert hints.main(words) == ExitCode.GOOD
    (run,) = json.loads(output.read_text())
    rates = run["hit_rates"]
    assert rates["lru, none"] < rates["lru, true"] <= run["best"] + 1e-9
    assert output.with_suffix(".csv").read_text().count("\n") == 2
    assert "lru: with a third of the hints false" in capsys.readouterr().out


def test_a_trace_without_hash_ids_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        hints.main(["--trace", str(tmp_path / "none.jsonl")])
    assert "--trace: " in capsys.readouterr().err
