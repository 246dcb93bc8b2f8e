"""The replay: what it reports is what happened, the same each time."""

import json
import random
from itertools import combinations

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_radix.cli import main
from vllm_radix_bench.replay import arms, oracles, runner
from vllm_radix_bench.replay.summary import jain, summary
from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.workloads.encoders import words
from vllm_radix_bench.workloads.sizing import build
from vllm_radix_bench.workloads.turn import Turn, longest_path

SMALL = ["--block-size", "32", "--blocks", "64", "--max-num-seqs", "4"]
SMALL += ["--max-num-batched-tokens", "512", "--pressure", "3", "--stretch", "0.25"]


def tokens(seed, count):
    return [1000 * seed + i for i in range(count)]


def options(**fields):
    return runner.Options([64], block_size=32, max_num_seqs=4,
                          max_num_batched_tokens=512, **fields)  # fmt: skip


def run(roots, arm="radix", **fields):
    longest = longest_path(roots)
    return runner.run_arm(runner.parse_arm(arm), roots, 64, options(**fields), longest)


def test_the_command_writes_the_same_each_time(tmp_path, capsys):
    results = []
    for name in ("a", "b"):
        output = tmp_path / f"{name}.json"
        words = ["replay", "--workload", "few-shot", "--load", "1.5", *SMALL]
        words += ["--arms", "stock", "radix", "apc-off", 'radix:{"policy": "lpm"}']
        words += ["--blocks", "64", "128", "--output", str(output)]
        csv = tmp_path / f"{name}.csv"
        assert main([*words, "--csv", str(csv)]) == 0
        results.append(json.loads(output.read_text()))
        assert results[-1].pop("machine")["scheduler_cpu_seconds_per_request"]
        assert all(r.pop("scheduler CPU, ms/request") for r in results[-1]["rows"])
        assert csv.read_text().startswith('"cache, blocks",arm,hit rate,')
        assert csv.read_text().count("\n") == 1 + len(results[-1]["rows"])
    assert results[0] == results[1]
    out = capsys.readouterr().out
    assert "Counts: the same in every run" in out
    assert "cost model's clock" in out and "flops_per_second=4.95e+14" in out
    first, second = results[0]["cells"]
    assert (first["blocks"], second["blocks"]) == (64, 128)
    arms = first["arms"]
    assert (
        arms["radix"]["computed_prompt_tokens"]
        < (arms["stock"]["computed_prompt_tokens"])
    )
    assert arms["apc-off"]["hit_rate"] == 0
    assert arms["apc-off"]["computed_prompt_tokens"] >= arms["apc-off"]["prompt_tokens"]
    assert results[0]["infinite_cache"] <= arms["radix"]["computed_prompt_tokens"]
    assert first["known_in_advance"] < arms["stock"]["computed_prompt_tokens"]
    assert arms["stock"]["hit_rate"] < arms["stock"]["hit_rate_best_eviction"] < 1


def test_a_trace_is_replayed(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"token_ids": tokens(i % 3, 200) + tokens(9 + i, 20), "output_length": 4,
         "arrival": i * 0.01, "tenant": "ab"[i % 2]}
        for i in range(30)
    ]  # fmt: skip
    trace.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.json"
    assert main(["replay", str(trace), *SMALL[:8], "--output", str(output)]) == 0
    (cell,) = json.loads(output.read_text())["cells"]
    assert cell["arms"]["radix"]["requests"] == 30
    assert set(cell["arms"]["radix"]["tenants"]) == {"a", "b"}
    assert 0 < cell["arms"]["radix"]["jain"] <= 1


def test_messages_are_read_with_a_chat_template(tmp_path, tiny):
    trace = tmp_path / "batch.jsonl"
    messages = [{"role": "user", "content": "Which rooms are open?"}]
    body = {"model": "m", "messages": messages, "max_tokens": 2}
    trace.write_text(json.dumps({"custom_id": "1", "body": body}))
    output = tmp_path / "out.json"
    words = ["replay", str(trace), *SMALL[:8], "--output", str(output)]
    assert main([*words, "--no-oracle", "--tokenizer", tiny]) == 0
    (cell,) = json.loads(output.read_text())["cells"]
    # The template opens a system message of its own, and the answer.
    assert 20 < cell["arms"]["stock"]["prompt_tokens"] < 60


def test_messages_without_a_tokenizer_are_refused(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(trace), "--output", str(tmp_path / "out" / "a.json")])
    assert stop.value.code == 2
    assert "allowed: with --tokenizer FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a trace, or --workload, and not both"),
        (["x.jsonl", "--workload", "chat"], "and not both"),
        (["/no/such.jsonl"], "/no/such.jsonl"),
        (["--workload", "chats"], "invalid choice: 'chats'"),
        (["--workload", "chat", "--arms", "sglang"], "--arms: 'sglang' is none of"),
        (["--workload", "chat", "--arms", 'radix:{"x": 1}'], "unknown radix option"),
        (["--workload", "chat", "--arms", "radix:{"], "takes nothing or a JSON object"),
        (["--workload", "chat", "--blocks", "1"], "'1' is not a whole number from 2"),
        (["--workload", "chat", "--cost", "flops=1"], "is not NAME=VALUE with a name"),
        (["--workload", "chat", "--cost", "bytes_per_second=0"], "at least 1"),
        (["--workload", "chat", "--limit", "3"], "--limit is of a trace"),
        (["--workload", "chat", "--closed-loop"], "--closed-loop is of a trace"),
        (["--workload", "chat", "--blocks", "9"], "does not fit a cache of 9 blocks"),
        (["--workload", "chat", "--load", "-1"], "'-1' is not a number from 0"),
        (["--workload", "chat", "--layout", "swa"], "--layout: layout 'swa': 'swa'"),
        (["--workload", "chat", "--layout", "model:."], "no config.json is in that"),
        (
            ["--workload", "chat", "--layout", "full/8+mamba/9"],
            "--layout: layout 'full/8+mamba/9' has blocks of 8 and 9 tokens",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(words, message, tmp_path, capsys):
    output = tmp_path / "out" / "runner.json"
    with pytest.raises(SystemExit) as stop:
        main(["replay", "--output", str(output), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not output.parent.exists()


def test_a_class_that_cannot_be_made_is_no_arm(tmp_path, monkeypatch):
    (tmp_path / "ends_at_import.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    abstract = "vllm.v1.core.sched.interface.SchedulerInterface"
    for arm in ("ends_at_import.Mine", abstract):
        with pytest.raises(ValueError, match=f"--arms: '{arm}' is none of .*abstract"):
            runner.parse_arm(arm)


def test_an_infinite_cache_computes_what_is_new():
    shared = tokens(1, 100)
    roots = [
        Turn(shared + tokens(2, 10), 5),
        Turn(shared + tokens(3, 20), 5, children=[Turn(tokens(4, 30), 5)]),
        Turn(shared + tokens(2, 10), 5),
        Turn(shared, 5, salt="other"),
    ]
    assert oracles.infinite_cache(roots) == 100 + 10 + 20 + 30 + 100


def exhaustive(paths, asked, blocks):
    """The most blocks that any order of eviction finds: all are tried."""
    states = {frozenset(): 0}
    for path, prompt in zip(paths, asked, strict=True):
        after = {}
        for cached, found in states.items():
            hit = 0
            while hit < prompt and path[hit] in cached:
                hit += 1
            others = sorted(cached - set(path))
            for size in range(min(len(others), blocks - len(path)) + 1):
                for kept in combinations(others, size):
                    state = frozenset(kept) | set(path)
                    after[state] = max(after.get(state, 0), found + hit)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(8))
def test_evicting_what_is_needed_last_finds_the_most(seed):
    rng = random.Random(seed)
    paths = []
    for _ in range(9):
        path, at = [], 0
        for _ in range(rng.randrange(1, 4)):
            at = 3 * at + rng.randrange(1, 3)
            path.append(at)
        paths.append(path)
    asked = [rng.randrange(1, len(path) + 1) for path in paths]
    found = oracles.farthest_next_use(paths, asked, 4)
    assert found == exhaustive(paths, asked, 4)


def test_the_best_eviction_knows_answers_and_salts():
    first = tokens(1, 64)
    roots = [
        Turn(first, 32, children=[Turn(tokens(2, 32), 1)]),
        Turn(first, 1, salt="other"),
        Turn(first, 1),
    ]
    order = ["0", "1", "0.0", "2"]
    # The child finds prompt and answer; the last request all but its last block.
    assert oracles.best_eviction(roots, order, 100, 32) == 96 + 32
    # Nothing fits beside a request, but what the child goes on with is in its way.
    assert oracles.best_eviction(roots, order, 4, 32) == 64 + 32


def test_known_in_advance_all_requests_are_there_in_tree_order():
    work = build("chat", words, num_blocks=64, block_size=32, pressure=2, seed=0)
    flat, answers = oracles.known_in_advance(work.roots)
    assert len(flat) == sum(1 for _ in work.turns())
    assert [turn.tokens for turn in flat] == sorted(turn.tokens for turn in flat)
    for at, answer in answers.items():
        assert len(answer) == flat[int(at)].max_tokens
        following = flat[int(at) + 1].tokens
        start = len(flat[int(at)].tokens)
        assert following[start : start + len(answer)] == answer
    longest = longest_path(work.roots)
    best = runner.parse_arm('radix:{"policy": "fcfs"}')
    known = runner.run_arm(best, flat, 64, options(), longest, answers=answers)
    stock = run(work.roots, "stock")
    assert known.computed_prompt_tokens < stock.computed_prompt_tokens


def test_times_overtakes_and_tenants_are_those_of_the_run():
    roots = [Turn(tokens(1, 100), 3, arrival=float(i), tenant=str(i)) for i in range(3)]
    outcome = run(roots, "stock")
    assert [record.sent for record in outcome.records] == [0.0, 1.0, 2.0]
    first = outcome.records[0]
    cost = CostModel()
    assert first.first_token == pytest.approx(cost.seconds([(100, 100)]))
    assert first.finished == pytest.approx(
        first.first_token + cost.seconds([(1, 101)]) + cost.seconds([(1, 102)])
    )
    assert outcome.engine_steps == 9
    assert outcome.computed_prompt_tokens == 100 + 4 + 4
    assert summary(outcome)["overtaken_most"] == 0
    assert jain([1, 1, 1]) == 1 and jain([1, 0]) == 0.5


def test_a_first_token_that_takes_no_time_on_the_clock_is_summed_up():
    cost = CostModel(flops_per_second=9e29, bytes_per_second=9e29, seconds_per_step=0)
    roots = [Turn(tokens(i, 64), 1, arrival=1e6, tenant=str(i)) for i in range(2)]
    total = summary(run(roots, "stock", cost=cost))
    assert total["ttft"]["mean"] == 0 and total["jain"] == 1


def test_a_turn_waits_for_its_answer_and_its_time():
    child = Turn(tokens(2, 10), 3, arrival=5.0)
    late = run([Turn(tokens(1, 64), 3, children=[child])], "stock")
    assert late.records[1].sent == 5.0
    assert late.records[1].prompt_tokens == 64 + 3 + 10
    child.arrival = 0.0
    soon = run([Turn(tokens(1, 64), 3, children=[child])], "stock")
    assert soon.records[1].sent == soon.records[0].finished
    child.delay = 2.0
    later = run([Turn(tokens(1, 64), 3, children=[child])], "stock")
    assert later.records[1].sent == later.records[0].finished + 2.0


def test_other_schedulers_and_priorities_can_be_run():
    roots = [Turn(tokens(i, 100), 3, priority=-i) for i in range(12)]
    name = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    assert runner.parse_arm(name).cls.__name__ == "AsyncScheduler"
    outcome = run(roots, "stock", priorities=True)
    by_finish = sorted(outcome.records, key=lambda record: record.finished)
    assert int(by_finish[0].id) > 4


HYBRID = ["--layout", "full+mambax3", "--arms", "stock", "apc-off", "--no-oracle"]


def test_a_layout_is_that_of_every_arm(tmp_path, capsys):
    output = tmp_path / "out.json"
    words = ["replay", "--workload", "chat", *SMALL[:2], "--blocks", "400"]
    sizes = ["--pressure", "1.5", "--output", str(output)]
    assert main([*words, *sizes, *HYBRID]) == 0
    result = json.loads(output.read_text())
    assert result["options"]["layout"] == "full+mambax3"
    (cell,) = result["cells"]
    assert 0 < cell["arms"]["stock"]["hit_rate"] < 0.9
    assert cell["arms"]["apc-off"]["hit_rate"] == 0
    assert "400 blocks in the layout full+mambax3" in capsys.readouterr().out
    assert main([*words, *sizes, "--layout", "full", *HYBRID[2:]]) == 0
    (full,) = json.loads(output.read_text())["cells"]
    assert full["arms"]["stock"]["hit_rate"] > cell["arms"]["stock"]["hit_rate"]


def test_one_group_of_full_attention_is_the_layout_of_none():
    work = build("chat", words, num_blocks=64, block_size=32, pressure=2, seed=0)
    plain, named = (
        summary(run(work.roots, "stock", layout=text)) for text in (None, "full")
    )
    assert plain == named


def test_a_model_folder_names_a_layout(tmp_path, tiny):
    output = tmp_path / "out.json"
    words = ["replay", "--workload", "chat", *SMALL[:8], "--output", str(output)]
    layout = ["--layout", f"model:{tiny}", "--arms", "stock", "--no-oracle"]
    assert main([*words, *layout]) == 0
    assert json.loads(output.read_text())["options"]["layout"] == "full/16"


def test_pressure_counts_what_keeps_all_tokens():
    made = options(layout="full/32x2+swa:64/16x5")
    assert made.dense_cache() == (32, 32)
    assert options(layout="swa:64/16x5").dense_cache() == (64, 16)
    assert options(layout="swa:64+chunked:128").dense_cache() == (64, 32)
    assert options().dense_cache() == (64, 32)


def test_a_request_must_fit_the_layout():
    roots = [Turn(tokens(1, 1500), 4)]
    assert runner.check(roots, options()) == 1504
    assert runner.check(roots, options(layout="full/32+mamba/32")) == 1504
    with pytest.raises(ValueError, match="1504 tokens needs 96 blocks in the layout"):
        runner.check(roots, options(layout="full/32x2"))


class Refusing(Scheduler):
    """Serves no layout of several groups."""

    def __init__(self, *, kv_cache_config, **options):
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise ValueError("mine has one group.")
        super().__init__(kv_cache_config=kv_cache_config, **options)


def test_an_arm_that_refuses_a_layout_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arms, "RadixScheduler", Refusing)
    output = tmp_path / "out" / "a.json"
    words = ["replay", "--workload", "chat", *SMALL, "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main([*words, *HYBRID[:2]])
    assert stop.value.code == 2
    said = "replay: --arms: 'radix' with the layout full+mambax3: mine has one group.\n"
    assert capsys.readouterr().err.endswith(said)
    with pytest.raises(SystemExit):
        main([*words, *HYBRID[:2], "--arms", "stock"])
    said = "the best order (--no-oracle skips it) with the layout full+mambax3: mine"
    assert said in capsys.readouterr().err
    assert not output.parent.exists()
