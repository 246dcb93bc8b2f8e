"""What the page on several engines says in words is what its results say."""

import json

import pytest

from support.pages import ROOT

PAGE = " ".join((ROOT / "docs" / "more-than-one-engine.md").read_text().split())
(PATH,) = (ROOT / "benchmarks" / "results" / "engines").glob("*-seed-0.json")
RUNS = {run["load"]: run for run in json.loads(PATH.read_text())}


def arm(load, rule, name):
    return RUNS[load]["routings"][rule][name]


def thousands(load, rule, name):
    return round(arm(load, rule, name)["computed_prompt_tokens"] / 1000)


def test_no_run_beats_the_fewest_possible():
    assert len(RUNS) == 27
    for run in RUNS.values():
        for arms in run["routings"].values():
            for one in arms.values():
                assert one["computed_prompt_tokens"] >= run["fewest"]
                assert sum(one["engines"]) == one["computed_prompt_tokens"]


def test_where_everything_fits_routing_is_all():
    load = "few-shot, 0.8x, load 0.9, 8 engines"
    for name in ("stock", "radix"):
        one = arm(load, "round-robin", name)["computed_prompt_tokens"]
        assert one / RUNS[load]["fewest"] == pytest.approx(5, abs=0.1)
    left = [thousands(load, "history", name) for name in ("stock", "radix")]
    assert "{} → {}, by hits inside blocks".format(*left) in PAGE
    saved = []
    for load in RUNS:
        if "0.8x" in load:
            stock, radix = (
                arm(load, "round-robin", name)["computed_prompt_tokens"]
                for name in ("stock", "radix")
            )
            saved.append(100 * (1 - radix / stock))
    assert [round(min(saved)), round(max(saved))] == [0, 7]
    assert "saves 0 to 7 % under round robin" in PAGE


def test_in_a_burst_both_multiply():
    load = "few-shot, 4x, at once, 4 engines"
    alone = thousands(load, "round-robin", "stock")
    radix = thousands(load, "round-robin", "radix")
    routing = thousands(load, "history", "stock")
    both, least = thousands(load, "history", "radix"), RUNS[load]["fewest"] / 1000
    by_one = f"{alone} → {radix} by radix alone, {alone} → {routing} by `history` alone"
    assert f"{by_one}, and {both} by both, where {least:.0f} is the fewest" in PAGE
    for rule in ("least-queue", "events"):
        assert thousands(load, rule, "radix") == radix, "nothing was told yet"


def test_a_hash_fails_under_a_shared_system_prompt():
    for load, run in RUNS.items():
        if run["workload"] == "chat" and run["engines"] == 4:
            most = arm(load, "prefix-hash", "radix")["imbalance"]["tokens"]
            assert most == pytest.approx(3, abs=0.25)


def test_where_it_is_behind_or_does_not_help():
    backlog = "few-shot, 4x, load 2, 8 engines"
    events, history = (
        thousands(backlog, rule, "radix") for rule in ("events", "history")
    )
    assert f"eight engines: {events:,} against {history:,}" in PAGE
    pair = [
        thousands("documents, 0.8x, load 0.9, 2 engines", "least-queue", name)
        for name in ("stock", "radix")
    ]
    assert "documents at load 0.9, two engines, {} → {}".format(*pair) in PAGE
    chats = "chat, 4x, at once, 4 engines"
    before = thousands(chats, "round-robin", "stock")
    after, least = thousands(chats, "history", "radix"), RUNS[chats]["fewest"] / 1000
    assert f"{before} → {after} is what both do with four engines" in PAGE
    assert f"where {least:.0f} is the fewest." in PAGE
