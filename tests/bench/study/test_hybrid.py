"""The study of hybrid layouts: its loads, what stock computes, and its tables."""

import json
from itertools import pairwise

import pytest

from vllm_radix.exits import ExitCode
from vllm_radix_bench.replay.runner import Arm
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.study import hybrid
from vllm_radix_bench.workloads import hybrid_loads as loads

ASYNC = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
MAMBA, WINDOW = hybrid.ROOM
COMPUTED = {
    ("documents", MAMBA): 43_752,
    ("documents", WINDOW): 30_568,
    ("chat", MAMBA): 31_440,
    ("chat", WINDOW): 18_960,
    ("fork tree", MAMBA): 33_249,
    ("fork tree", WINDOW): 21_329,
}
"""What stock vLLM 0.32 computes, measured before this study was written."""
FEWEST = {"documents": 17_760, "chat": 12_552, "fork tree": 18_233}


@pytest.mark.parametrize("cell", hybrid.traffic_cells(0), ids=lambda c: c.load)
def test_stock_computes_what_was_measured(cell):
    run = hybrid.run_cell((cell, ("stock",)))
    name = cell.load.partition(",")[0]
    stock = run["arms"]["stock"]
    assert stock["computed_tokens"] == COMPUTED[name, cell.layout]
    assert run["fewest"] == FEWEST[name]
    generated = sum(turn.max_tokens for wave in cell.waves() for turn in wave)
    assert (stock["engine_steps"] >= generated) == cell.load.endswith("one by one")
    assert stock["preemptions"] == 0


@pytest.mark.parametrize(
    ("layout", "blocks", "hit_rate"),
    [
        ("full/512+mamba/512x3", 50, 0.503),
        ("full/512+mamba/512x3", 60, 0.597),
        ("full/32+swa:128/32", 360, 0.136),
        ("full/32+swa:128/32", 420, 0.544),
        ("swa:512/32x2+full/32", 600, 0.444),
    ],
)
@pytest.mark.parametrize("arm", ["stock", ASYNC])
def test_hit_rates_of_small_pools_are_those_measured(layout, blocks, hit_rate, arm):
    cells = hybrid.pressure_cells(0, points=0)
    (cell,) = [c for c in cells if (c.layout, c.blocks) == (layout, blocks)]
    run = hybrid.run_cell((cell, (arm,)))
    assert run["arms"][arm]["hit_rate"] == pytest.approx(hit_rate, abs=5e-4)


def test_fewest_tokens_are_those_of_the_unshared_parts():
    first, second = [1, 2, 3, 4], [1, 2, 9]
    turns = [loads.Turn(first, 2), loads.Turn(second, 1), loads.Turn(first, 1)]
    # A known prompt's last token is computed; an answer of 2 feeds one token back.
    assert loads.fewest_tokens(turns) == 4 + 1 + 1 + 1
    onward = loads.Turn([*first, loads.ANSWER, loads.ANSWER, 5, 6], 1)
    assert loads.fewest_tokens([turns[0], onward]) == 5 + 2


def test_a_wave_waits_for_the_one_before():
    waves = loads.chat(0)
    assert [len(wave) for wave in waves] == [8] * 6
    roots, answers = loads.roots_of(waves)
    assert len({turn.arrival for turn in roots}) == 6
    assert len(answers) == 48 and set(answers["47"]) == {loads.ANSWER}
    apart = loads.one_by_one(waves)
    assert [turn for (turn,) in apart] == roots
    for before, after in pairwise(wave[3] for wave in waves):
        length = len(before.tokens)
        assert after.tokens[:length] == before.tokens
        assert set(after.tokens[length : length + 150]) == {loads.ANSWER}


@pytest.mark.parametrize("order", loads.ORDERS)
def test_sessions_speak_in_an_order(order):
    made = loads.Sessions(sessions=4, rounds=30, start=20, answer=2, order=order)
    firsts = [tuple(turn.tokens[:20]) for (turn,) in made.waves(0)]
    counts = [firsts.count(first) for first in dict.fromkeys(firsts)]
    assert sum(counts) == 120 and len(counts) == 4
    assert (counts == [30] * 4) == (order == "in turn")
    if order == "zipf":
        assert max(counts) > 2 * min(counts)
    again = [tuple(turn.tokens[:20]) for (turn,) in made.waves(0)]
    assert again == firsts
    assert [tuple(t.tokens[:20]) for (t,) in made.waves(1)] != firsts


def test_points_are_drawn_alike_for_a_seed_and_fit_their_pools():
    cells = hybrid.pressure_cells(0, points=48)
    assert cells == hybrid.pressure_cells(0, points=48)
    assert cells[:20] == hybrid.pressure_cells(0, points=4)
    drawn = cells[16:]
    assert len(drawn) == 48
    assert {cell.layout for cell in drawn} == set(hybrid.DRAWN)
    assert {cell.sessions.order for cell in drawn} == set(loads.ORDERS)
    assert all(3 <= cell.sessions.sessions <= 12 for cell in drawn)
    assert drawn != hybrid.pressure_cells(1, points=48)[16:]


def test_blocks_that_keep_a_path():
    keep = {"full/32": 4, "full/32+swa:50/32": 6, "full/32+mamba/32x3": 7}
    keep |= {"full/32+chunked:64/32": 8, "swa:1024/32": 4}
    for text, blocks in keep.items():
        assert Layout.parse(text).blocks_to_keep(100) == blocks


def made(part, stock, radix, fewest=60):
    def arm(tokens):
        return {
            "computed_tokens": tokens,
            "hit_rate": 1 - tokens / 200,
            "engine_steps": 9,
            "preemptions": 0,
        }

    cell = {"part": part, "load": "chat", "layout": "full/16", "blocks": 9, "seed": 0}
    arms = {"stock": arm(stock), "radix": arm(radix)}
    return {**cell, "fewest": fewest, "arms": arms}


def test_arms_are_compared_with_stock():
    better, worse = made("pressure", 100, 70), made("pressure", 100, 110)
    assert hybrid.share_of_the_way(better, "radix") == 0.75
    assert hybrid.share_of_the_way(made("traffic", 60, 60), "radix") is None
    assert not hybrid.is_below(better, "radix") and hybrid.is_below(worse, "radix")
    assert not hybrid.is_below(made("pressure", 100, 100), "radix")
    assert hybrid.sentences([better, worse], ["stock", "radix"]) == [
        "radix: mean hit rate 0.500 → 0.550; below stock at 1 of 2 points"
    ]


def test_tables_and_files_are_written(tmp_path, monkeypatch, capsys):
    runs = [made("traffic", 100, 70), made("pressure", 100, 110)]
    monkeypatch.setattr(hybrid, "collect", lambda *anything: runs)
    monkeypatch.setattr(
        "vllm_radix_bench.replay.checks.check_arms", lambda options: None
    )
    output = tmp_path / "made" / "hybrid.json"
    assert hybrid.main(["--output", str(output)]) == ExitCode.GOOD
    said = capsys.readouterr().out
    assert "75%" in said and "0.450" in said and "below stock" in said
    assert "below stock at 1 of 1 points" in said
    header, first, second = output.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("part,load,layout,")
    assert first.startswith("traffic,chat") and second.startswith("pressure,chat")


def test_a_study_of_stock_is_run_in_processes(tmp_path, capsys):
    output = tmp_path / "hybrid.json"
    words = ["--part", "pressure", "--points", "1", "--arms", ASYNC, "--jobs", "1"]
    assert hybrid.main([*words, "--json", str(output)]) == ExitCode.GOOD
    runs = json.loads(output.read_text())
    assert len(runs) == 17
    for run in runs:
        assert list(run["arms"]) == ["stock", ASYNC]
        assert 0 <= run["arms"]["stock"]["hit_rate"] < 1
    assert "of 17 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--part", "both"], "invalid choice: 'both'"),
        (["--arms", "sglang"], "--arms: 'sglang' is none of"),
        (["--points", "-1"], "'-1' is not a whole number from 0"),
        (["--seeds", "x"], "'x' is not a whole number from 0"),
    ],
)
def test_bad_options_end_the_study_before_its_work(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        hybrid.main([*words, "--output", str(tmp_path / "made" / "x.json")])
    assert stop.value.code == ExitCode.INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_arm_that_refuses_a_layout_ends_the_study(tmp_path, monkeypatch, capsys):
    def refusing(**anything):
        raise ValueError("no such groups here.")

    arm = Arm("mine", refusing)
    monkeypatch.setattr("vllm_radix_bench.replay.checks.parse_arm", lambda name: arm)
    with pytest.raises(SystemExit) as stop:
        hybrid.main(["--arms", "mine", "--output", str(tmp_path / "made" / "x.json")])
    assert stop.value.code == ExitCode.INPUT
    said = f"error: --arms: 'stock' with the layout {MAMBA}: no such groups here.\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (tmp_path / "made").exists()
