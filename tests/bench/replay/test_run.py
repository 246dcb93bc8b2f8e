"""The command `replay`: what it keeps, says and ends with."""

import json

import pytest

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.replay import runner
from vllm_radix_bench.replay.verdict import cache_size, verdict
from vllm_radix_bench.sim.driver import StalledError
from vllm_radix_bench.traces.load import load

ARMS = ["stock", "radix", "apc-off"]
GEMMA4 = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 128,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "num_kv_shared_layers": 0,
}
"""A toy with sliding windows."""


def lines(count, apart):
    """Return a trace: three prefixes, requests this many seconds apart."""
    for i in range(count):
        prompt = [*range(i % 3 * 1000, i % 3 * 1000 + 600), *range(9000 + i, 9020 + i)]
        yield {"token_ids": prompt, "output_length": 4, "arrival": i * apart,
               "tenant": "ab"[i % 2]}  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines(30, 0.5))))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "r.json"


@pytest.fixture
def words(trace, output):
    made = ["replay", str(trace), "--blocks", "50", "--max-num-seqs", "4"]
    return [*made, "--arms", *ARMS, "--output", str(output)]


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function: the run of that number, from 0, ends with an error."""
    run_arm, done = runner.run_arm, []

    def stop(number, error):
        done.clear()

        def limited(arm, *rest):
            if len(done) == number:
                raise error
            done.append(arm.name)
            return run_arm(arm, *rest)

        monkeypatch.setattr(runner, "run_arm", limited)
        return done

    return stop


def unfinished(output):
    return output.with_name("r.json.unfinished")


def test_each_request_has_a_row(words, output):
    assert main(words) == ExitCode.GOOD
    text = output.read_text()
    result = json.loads(text)
    (cell,) = result["cells"]
    assert list(cell["requests"]) == ARMS
    names = result["request_columns"]
    for arm, rows in cell["requests"].items():
        records = [dict(zip(names, row, strict=True)) for row in rows]
        assert [record["id"] for record in records] == [str(i) for i in range(30)]
        assert {record["tenant"] for record in records} == {"a", "b"}
        total = cell["arms"][arm]
        for key in ("prompt_tokens", "cached_tokens", "preemptions"):
            assert sum(record[key] for record in records) == total[key]
        assert max(record["overtaken"] for record in records) == total["overtaken_most"]
        mean = sum(record["ttft"] for record in records) / 30
        assert mean == pytest.approx(total["ttft"]["mean"], abs=1e-5)
        assert all(record["steps"] > 0 for record in records)
    first = json.dumps(cell["requests"]["stock"][0])
    assert text.count(f"{first},\n") == 3 or f"  {first},\n" in text, "a row a line"


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_interrupted_replay_is_gone_on_with(number, words, output, stop_at, capsys):
    main(words)
    whole = json.loads(output.read_text())
    output.unlink()
    stop_at(number, KeyboardInterrupt())
    assert main(words) == ExitCode.INTERRUPTED
    err = capsys.readouterr().err
    assert not output.exists()
    if number:
        assert (
            f"interrupted; {number} of 4 pieces are kept in {unfinished(output)}"
            in (err)
        )
    else:
        assert "vllm-radix replay: interrupted; no finished piece is kept\n" in err
    done = stop_at(None, None)
    assert main([*words, "--resume"]) == ExitCode.GOOD
    assert len(done) == 4 - number
    assert not unfinished(output).exists()
    again = json.loads(output.read_text())
    for result in (whole, again):
        del result["machine"]
        for row in result["rows"]:
            del row["scheduler CPU, ms/request"]
    assert again == whole


def test_a_replay_goes_on_only_with_equal_options(
    words, trace, output, stop_at, capsys
):
    stop_at(2, KeyboardInterrupt())
    main(words)
    capsys.readouterr()
    for others, said in (
        (["--rate", "2"], "--rate was 1.0, is 2.0"),
        (["--max-num-seqs", "5"], "--max-num-seqs was 4, is 5"),
        (["--priority"], "--priority was false, is true"),
        (["--cost", "seconds_per_step=1"], "--cost seconds_per_step was 0.002, is 1.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--resume", *others])
        assert stop.value.code == ExitCode.INPUT
        assert said in capsys.readouterr().err
    trace.write_text("\n".join(map(json.dumps, lines(29, 0.5))))
    with pytest.raises(SystemExit):
        main([*words, "--resume"])
    assert "the fingerprint of the requests was" in capsys.readouterr().err


def test_a_scheduler_that_stops_is_no_verdict(words, stop_at, capsys):
    stop_at(1, StalledError("3 requests wait and none is scheduled"))
    assert main(words) == ExitCode.ENGINE
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("vllm-radix replay: 3 requests wait and none is scheduled; 1")


def test_a_folder_is_no_output(words, tmp_path, capsys):
    for option in ("--output", "--csv"):
        assert main([*words, option, str(tmp_path)]) == ExitCode.OUTPUT
        said = f"vllm-radix replay: {option}: {tmp_path} is a folder, not a file\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("length", [300, 250, 246])
def test_a_name_that_is_too_long_is_no_output(length, words, tmp_path, capsys):
    path = tmp_path / "made" / ("x" * length)
    assert main([*words, "--output", str(path)]) == ExitCode.OUTPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-radix replay: --output: {path} cannot ")
    assert "File name too long" in line
    assert not list(tmp_path.glob("made/*"))


def test_too_much_load_is_told_with_a_rate_that_is_not(words, trace, output, capsys):
    """The rate that is proposed is a load that the modelled GPU can serve."""
    trace.write_text("\n".join(map(json.dumps, lines(60, 0.005))))
    assert main(words) == ExitCode.GOOD
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("The requests come in 0.295 s, and the modelled GPU serves ")
    assert "with every arm: waits grow" in last
    assert "order matters more than the cache; try --rate 0." in last
    assert main([*words, "--rate", last.split()[-1].rstrip(".")]) == ExitCode.GOOD
    assert "try --rate" not in capsys.readouterr().out


def made(name, computed, p99, preemptions=0, overloaded=False):
    return {
        name: {
            "computed_prompt_tokens": computed,
            "hit_rate": 1 - computed / 10_000,
            "preemptions": preemptions,
            "ttft": {"mean": 0.5, "p99": p99},
            "overloaded": overloaded,
            "seconds": 300.0,
        }
    }


def result(*cells):
    return {
        "cells": [{"blocks": 25_000 + i, "arms": cell} for i, cell in enumerate(cells)],
        "last_arrival": 100.0,
        "input": {"rate": 1.0},
        "options": {
            "block_size": 16,
            "layout": None,
            "cost": {"kv_bytes_per_token": 131072},
        },
    }


def test_a_verdict_is_quotable_and_names_what_got_worse():
    cells = [
        {**made("stock", 9_640, 1.0, 2), **made("radix", 9_500, 1.25, 33)},
        {**made("stock", 5_000, 1.0), **made("radix", 2_500, 1.0)},
        {**made("stock", 5_000, 1.0), **made("apc-off", 5_000, 1.0)},
    ]
    first, second = verdict(result(*cells))
    assert first == (
        "With 25,000 blocks radix computed 1 % fewer prompt tokens (9,640 → 9,500; hit "
        "rate 3.6% → 5.0%); mean TTFT 0.500 → 0.500 s on the cost model's clock; got "
        "worse: TTFT p99 1.000 → 1.250 s, preemptions 2 → 33."
    )
    assert "radix computed 50 % fewer" in second and "worse" not in second


def test_an_arm_that_alone_is_overloaded_is_named():
    stock = made("stock", 9_000, 1.0, overloaded=True)
    said = verdict(result({**stock, **made("radix", 8_000, 1.0)}))
    assert said[1] == (
        "The requests come in 100 s, and the modelled GPU serves them in 300 s with "
        "stock: waits grow as long as they come, and order matters more than the "
        "cache; try --rate 0.33."
    )
    assert not verdict(result(made("stock", 9_000, 1.0)))


@pytest.mark.parametrize(("last", "end"), [(3e-4, "; try --rate 1e-06."), (2e-4, ".")])
def test_no_rate_is_proposed_that_the_command_does_not_take(last, end):
    stock = made("stock", 9_000, 1.0, overloaded=True)
    (said,) = verdict({**result(stock), "last_arrival": last})
    assert said.endswith(f"order matters more than the cache{end}")


def test_the_cache_is_told_in_gb_where_the_cost_model_knows():
    about = result()
    said = "25,000 blocks of 16 tokens (400,000 tokens, 52.4 GB)"
    assert cache_size(about, 25_000) == said
    about["options"]["cost"]["kv_bytes_per_token"] = 0
    assert cache_size(about, 25_000) == "25,000 blocks of 16 tokens (400,000 tokens)"
    about["options"]["layout"] = "full+swa:64"
    assert cache_size(about, 25_000) == "25,000 blocks in the layout full+swa:64"


@pytest.mark.parametrize(
    "times", [[0, 3600], [i for i in range(30)], [*[0] * 20, *[3600] * 20]]
)
def test_light_load_and_a_last_burst_are_no_overload(times, words, trace, capsys):
    made = [
        {**one, "arrival": at} for one, at in zip(lines(99, 1), times, strict=False)
    ]
    trace.write_text("\n".join(map(json.dumps, made)))
    assert main(words) == ExitCode.GOOD
    assert "modelled GPU serves" not in capsys.readouterr().out


def test_a_replay_goes_on_only_with_equal_options_of_the_environment(
    words, stop_at, capsys, monkeypatch
):
    stop_at(2, KeyboardInterrupt())
    main(words)
    monkeypatch.setenv("RADIX_POLICY", "fcfs")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume"])
    assert stop.value.code == ExitCode.INPUT
    assert "RADIX_ variables among them" in capsys.readouterr().err


def test_other_delays_are_other_requests(trace):
    def print_of(delay):
        line = {"hash_ids": [1], "input_length": 500, "output_length": 1}
        turns = [{**line, "session_id": "s", "delay": d} for d in (0, delay)]
        trace.write_text("\n".join(map(json.dumps, turns)))
        return runner.fingerprint(load(trace, list))

    assert print_of(5) != print_of(50_000)
    assert print_of(5) == print_of(5)


@pytest.mark.parametrize("option", ["--output", "--csv"])
def test_an_output_is_neither_the_trace_nor_another_output(
    option, words, trace, tmp_path, capsys
):
    same = trace if option == "--output" else tmp_path / "out" / ".." / "out" / "r.json"
    before = trace.read_text()
    with pytest.raises(SystemExit) as stop:
        main([*words, option, str(same)])
    assert stop.value.code == ExitCode.INPUT
    assert "allowed: another file" in capsys.readouterr().err
    assert trace.read_text() == before


def test_a_budget_below_the_slots_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--max-num-batched-tokens", "3"])
    assert stop.value.code == ExitCode.INPUT
    assert "--max-num-batched-tokens: 3 is less than" in capsys.readouterr().err


def test_a_threshold_beyond_all_prompts_changes_nothing(words, output):
    assert main([*words, "--long-prefill-token-threshold", "100000"]) == ExitCode.GOOD
    assert output.exists()


def test_the_default_output_is_named_for_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workload = ["--workload", "few-shot", "--blocks", "200", "--no-oracle"]
    assert main(["replay", *workload]) == ExitCode.GOOD
    assert (tmp_path / "results" / "replay.json").exists()


SMOLLM2_BLOCK = 2 * 30 * 3 * 64 * 2 * 16
"""Bytes: keys and values of 30 layers with 3 heads of 64, bfloat16, 16 tokens."""


def test_a_cache_in_gb_is_the_blocks_that_a_server_has(words, output, smollm2, capsys):
    """One block is vLLM's own."""
    at = words.index("--blocks")
    gb = [f"{SMOLLM2_BLOCK * n / 1e9}" for n in (51.5, 101.5)]
    words[at : at + 2] = ["--kv-gb", *gb, "--model", smollm2]
    assert main(words) == ExitCode.GOOD
    result = json.loads(output.read_text())
    assert [cell["blocks"] for cell in result["cells"]] == [50, 100]
    assert result["options"]["layout"] is None
    assert result["options"]["bytes_per_block"] == SMOLLM2_BLOCK
    assert "50 blocks of 16 tokens (800 tokens, 0.018 GB)" in capsys.readouterr().out
    # Twice the tokens in a block, half the blocks.
    assert main([*words, "--block-size", "32"]) == ExitCode.GOOD
    result = json.loads(output.read_text())
    assert [cell["blocks"] for cell in result["cells"]] == [24, 49]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--kv-gb", "1"], "--kv-gb: name the model with --model FOLDER_OR_NAME, too"),
        (["--model", "SMOLLM2"], "--model: it is for --kv-gb, which is not given"),
        (["--kv-gb", "1", "--model", "SMOLLM2", "--layout", "full"], "--layout: with "),
        (["--kv-gb", "1", "--model", "."], "--model: .: no config.json is in that"),
        (
            ["--kv-gb", "1", "--model", "a/b"],
            "--model: a/b: no such folder is here, an",
        ),
        (["--kv-gb", "0", "--model", "SMOLLM2"], "--kv-gb: '0' is not a number from"),
        (
            ["--kv-gb", "0.0003", "--model", "SMOLLM2"],
            "--kv-gb: 0.0003 GB hold 0 block",
        ),
        (["--kv-gb", "9999", "--model", "SMOLLM2"], "allowed: 0.0011 to 365"),
        (["--kv-gb", "0.01", "--model", "SMOLLM2"], "--kv-gb: a request of 624 tokens"),
        (
            ["--kv-gb", "1", "--blocks", "9"],
            "--blocks: not allowed with argument --kv-gb",
        ),
    ],
)
def test_what_is_wrong_with_a_cache_in_gb_is_named(
    words, output, smollm2, more, said, capsys
):
    at = words.index("--blocks")
    del words[at : at + 2]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *(smollm2 if word == "SMOLLM2" else word for word in more)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not output.parent.exists()


def test_a_hybrid_model_brings_its_layout(words, output, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA4))
    at = words.index("--blocks")
    words[at : at + 2] = ["--kv-gb", "0.004", "--model", str(tmp_path)]
    words += ["--no-oracle", "--arms", "stock"]
    assert main(words) == ExitCode.GOOD
    result = json.loads(output.read_text())
    assert result["options"]["layout"] == "swa:128/32x2+full/16"
    # Two layers in a group: keys and values of 2 heads, bfloat16.
    assert result["options"]["bytes_per_block"] == 2 * (2 * 2 * 32 * 2 * 32)
    assert result["cells"][0]["blocks"] == int(0.004e9 // 16_384) - 1
    said = "243 blocks in the layout swa:128/32x2+full/16, 0.004 GB"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--block-size", "32"])
    assert "--block-size: with --kv-gb and a hybrid" in capsys.readouterr().err
