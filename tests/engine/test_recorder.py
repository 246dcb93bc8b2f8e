"""A server's traffic, recorded and replayed: the same tokens are computed."""

import json

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from support.engine_double import EngineDouble, make_scheduler
from support.prompts import prompt
from vllm_radix import RadixScheduler
from vllm_radix.engine.recorder import engine_path
from vllm_radix_bench.replay import runner
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.builders import BUILDERS
from vllm_radix_bench.workloads.encoders import words
from vllm_radix_bench.workloads.sizing import REFERENCE_CACHE, build
from vllm_radix_bench.workloads.turn import longest_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.jsonl"


def lines_of(path):
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header["vllm_radix_trace"] == 1
    return lines


def computed(path):
    """Return the prompt tokens that a trace says were computed."""
    return sum(line["input_length"] - line["cached"] for line in lines_of(path))


def replay(path, options, blocks):
    turns = load(path, None)
    arm = runner.parse_arm("radix")
    return runner.run_arm(arm, turns, blocks, options, longest_path(turns))


def what_happened(outcome):
    return outcome.computed_prompt_tokens, outcome.engine_steps, outcome.seconds


def of_each(outcome):
    return [
        (r.prompt_tokens, r.cached_tokens, r.steps, r.preemptions)
        for r in sorted(outcome.records, key=lambda record: record.sent)
    ]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("layout", "pressure"), [(None, 0.5), (None, 3), ("full+swa:64", 0.5)]
)
def test_a_recorded_trace_replayed_computes_the_same(path, name, layout, pressure):
    """Built-in loads over time, recorded on the clock of the cost model."""
    blocks = 300 if layout is None else 600
    roots = build(
        name,
        words,
        num_blocks=300,
        block_size=16,
        pressure=pressure,
        seed=0,
        stretch=REFERENCE_CACHE / 4800,
    ).roots
    runner.shuffle(roots, 0)
    runner.send_at_rate(roots, 20.0, 0)
    # Else seconds differ in their last digits, and a step may begin before one comes.
    roots[0].arrival = 0.0
    options = runner.Options(
        [blocks], max_num_seqs=16, max_num_batched_tokens=1024, layout=layout
    )
    # Under pressure the order of equal candidates matters, and with it the tokens.
    record = {"record": str(path), "record_tokens": pressure > 1}
    arm = runner.parse_arm(f"radix:{json.dumps(record)}")
    outcome = runner.run_arm(arm, roots, blocks, options, longest_path(roots))
    again = replay(path, options, blocks)
    assert what_happened(again) == what_happened(outcome)
    assert of_each(again) == of_each(outcome)
    if not sum(record.preemptions for record in outcome.records):
        assert computed(path) == outcome.computed_prompt_tokens


@pytest.fixture
def recorded(path):
    """Return a function that makes an engine which records, a second each step."""

    def made(lag=0, layout=None, **options):
        scheduler = make_scheduler(
            RadixScheduler,
            block_size=16,
            num_blocks=options.pop("num_blocks", 100),
            asynchronous=lag > 0,
            layout=layout,
            radix={"record": str(path), **options.pop("radix", {})},
            **options,
        )
        engine = EngineDouble(scheduler, lag)
        scheduler.clock = lambda: float(engine.steps)
        return engine

    return made


@pytest.mark.parametrize("lag", [0, 1])
def test_turns_of_a_conversation_share_the_answers(recorded, path, lag):
    engine = recorded(lag)
    said = prompt("system", 50)
    for turn in range(4):
        said = said + prompt(turn, 13)
        engine.add(str(turn), said, max_tokens=9)
        engine.run()
        said = said + engine.outputs[str(turn)]
    engine.scheduler.shutdown()
    lines = lines_of(path)
    assert [line["input_length"] for line in lines] == [63, 85, 107, 129]
    assert [line.get("shared", 0) for line in lines] == [0, 72, 94, 116]
    assert [line["cached"] for line in lines] == [
        engine.cached[str(turn)] for turn in range(4)
    ]
    assert lines[-1]["cached"] >= 115
    options = runner.Options([99])
    assert replay(path, options, 99).computed_prompt_tokens == computed(path)


@pytest.mark.parametrize("lag", [0, 1])
def test_each_request_has_a_line_however_it_ends(recorded, path, lag):
    engine = recorded(lag, num_blocks=14, max_num_seqs=3, max_num_batched_tokens=64)
    for name in "abc":
        engine.add(name, prompt(name, 60), max_tokens=60)
    engine.add("waits", prompt("waits", 60))
    for _ in range(12):
        engine.step()
    engine.abort("waits")
    engine.abort("b")
    engine.run()
    assert engine.resumed, "none was preempted"
    engine.scheduler.shutdown()
    lines = {line["request"]: line for line in lines_of(path)}
    assert sorted(lines) == [0, 1, 2, 3]
    assert [lines[n]["ended"] for n in range(4)] == [
        "length", "abort", "length", "abort",
    ]  # fmt: skip
    assert [lines[n]["output_length"] for n in (0, 2, 3)] == [60, 60, 0]
    assert 0 < lines[1]["output_length"] < 60
    assert "cached" not in lines[3] and "cached" in lines[1]
    assert [turn.max_tokens for turn in load(path, None)] == [
        60, lines[1]["output_length"], 60,
    ]  # fmt: skip


def test_hints_are_kept_as_they_were_given_but_for_ids_of_responses(recorded, path):
    engine = recorded()
    for name, given in (
        ("a", {"radix_expect_in": 20, "radix_priority": "high", "other": 1}),
        ("b", {"radix_end_session": 1, "radix_replaces": "cmpl-1"}),
        ("c", {"radix_replaces": "cmpl-1"}),
        ("wrong", {"radix_expect_in": -1}),
        ("none", {"other": 1}),
    ):
        engine.add(name, prompt(name, 40), extra_args=given)
        engine.run()
    engine.scheduler.shutdown()
    said = [line.get("hints") for line in lines_of(path)]
    high = {"radix_expect_in": 20, "radix_priority": "high"}
    assert said == [high, {"radix_end_session": 1}, None, None, None]
    assert [turn.hints for turn in load(path, None)] == [one or {} for one in said]


def test_salts_and_tenants_are_told_apart_and_not_named(recorded, path):
    engine = recorded(radix={"tenant": "user"})
    said = prompt("said", 40)
    for name, salt, user in (("a", "x", "u"), ("b", "y", "u"), ("c", "x", "v")):
        engine.add(name, said, cache_salt=salt, extra_args={"user": user})
        engine.run()
    engine.scheduler.shutdown()
    a, b, c = lines_of(path)
    assert (a["salt"] == c["salt"], a["salt"] == b["salt"]) == (True, False)
    assert (a["tenant"] == b["tenant"], a["tenant"] == c["tenant"]) == (True, False)
    assert ("of" in b, c["of"]) == (False, 0)


def test_an_input_that_is_streamed_in_parts_is_one_request(recorded, path):
    engine = recorded()
    engine.add("session", prompt("a", 40), resumable=True)
    engine.add("session", prompt("b", 40), resumable=True)
    engine.add("other", prompt("c", 40))
    for _ in range(20):
        engine.step()
    engine.add("session", [3], resumable=False)
    engine.run()
    engine.scheduler.shutdown()
    lines = {line["request"]: line for line in lines_of(path)}
    assert sorted(lines) == [0, 1]
    assert (lines[0]["input_length"], lines[1]["input_length"]) >= (80, 40)
    assert len(load(path, None)) == 2


def test_media_are_told_apart_though_their_tokens_are_equal(recorded, path):
    engine = recorded(radix={"record_tokens": True})
    for name, picture in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        media = MultiModalFeatureSpec(
            data=None,
            modality="image",
            identifier=picture,
            mm_position=PlaceholderRange(offset=20, length=20),
        )
        engine.add(name, [7] * 60, mm_features=[media])
        engine.abort(name)
    engine.scheduler.shutdown()
    lines = lines_of(path)
    # Blocks of 16: the picture begins in the second, and 48 of 60 tokens are whole.
    assert [line.get("shared", 0) for line in lines] == [0, 16, 48]
    assert lines[2]["of"] == 0
    assert not any("new_ids" in line for line in lines)


def test_the_header_has_what_a_replay_needs_to_be_told(recorded, path):
    recorded(max_num_seqs=7, max_num_batched_tokens=512).scheduler.shutdown()
    server = json.loads(path.read_text())["server"]
    assert (server["blocks"], server["block_size"]) == (99, 16)
    assert (server["max_num_seqs"], server["max_num_batched_tokens"]) == (7, 512)


def test_without_the_option_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = EngineDouble(make_scheduler(RadixScheduler))
    engine.add("a", prompt("a", 40))
    engine.run()
    engine.scheduler.shutdown()
    assert engine.scheduler.recorder is None
    assert list(tmp_path.iterdir()) == []


def test_a_replay_is_not_recorded_because_the_environment_says_so(monkeypatch, path):
    monkeypatch.setenv("RADIX_RECORD", str(path))
    assert runner.parse_arm("radix").radix["record"] == ""
    assert runner.parse_arm('radix:{"record": "t.jsonl"}').radix["record"] == "t.jsonl"


def test_a_layout_with_windows_is_recorded_to_the_token(recorded, path):
    engine = recorded(layout=Layout.parse("full+swa:64"), num_blocks=200)
    assert type(engine.scheduler.kv_cache_manager).__name__.startswith("Hybrid")
    engine.scheduler.shutdown()
    assert lines_of(path) == []


def test_each_engine_of_several_has_a_file_of_its_own(tmp_path):
    names = [engine_path(f"{tmp_path}/t.jsonl", rank).name for rank in range(3)]
    assert names == ["t.jsonl", "t.dp1.jsonl", "t.dp2.jsonl"]
    assert engine_path("t", 1).name == "t.dp1"


@pytest.mark.parametrize("tokens", [True, False])
def test_a_trace_is_written_as_if_nothing_were_public(tmp_path, tokens):
    public = prompt("system", 70)
    traces = []
    for number, option in enumerate(("", {"prompts": [public]})):
        file = tmp_path / f"{number}.jsonl"
        radix = {"record": str(file), "record_tokens": tokens, "public_prefix": option}
        scheduler = make_scheduler(block_size=16, num_blocks=80, radix=radix)
        engine = EngineDouble(scheduler, public=[public] if option else ())
        for name in ("a", "b", "a again"):
            engine.add(name, public + prompt("x", 40), cache_salt=name[0])
            engine.run()
        scheduler.shutdown()
        traces.append(lines_of(file))
    assert [line["cached"] for line in traces[1]] == [0, 64, 109]
    salts = [line["salt"] for line in traces[1]]
    assert salts[0] == salts[2] != salts[1]
    # Salts are told by a secret of each trace, and the double's answers by salts.
    for line in (*traces[0], *traces[1]):
        del line["cached"], line["arrival"], line["salt"]
        if tokens:
            line["new_ids"] = line["new_ids"][: -line["output_length"]]
    assert traces[0] == traces[1]
    assert "-2147483" not in (tmp_path / "1.jsonl").read_text()
