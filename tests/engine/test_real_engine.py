"""The real engine with the tiny model: the A/B's claims, small and as a test."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest

from vllm_radix.cli import main
from vllm_radix_bench.ab.offline import report, runner
from vllm_radix_bench.replay import runner as replay
from vllm_radix_bench.workloads.turn import longest_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """One small A/B of counts: all workloads, under pressure and not."""
    folder = tmp_path_factory.mktemp("ab")
    output = folder / "ab.json"
    words = ["ab", "--offline", "--model", tiny, "--no-texts", "--repeats", "1"]
    # Seconds must not decide anything here, on a machine of any speed.
    words += ["--blocks", "64", "--output", str(output)]
    words += ["--radix", '{"max_extra_wait": 1e6}']
    with redirect_stdout(io.StringIO()) as shown:
        status = main([*words, "--load-format", "dummy"])
    return status, json.loads(output.read_text()), folder, shown.getvalue()


def cells(result, loaded):
    for cell in result["counts"]:
        if (cell["pressure"] > 1) == loaded:
            yield cell["workload"], cell


def test_it_exits_with_0_and_writes_everything(run):
    status, result, folder, shown = run
    assert status == 0
    assert re.match(
        r"radix computed \d\d % fewer prompt tokens", shown.splitlines()[-1]
    )
    assert "one pair of runs says nothing" in shown and "…" not in shown
    assert {"versions", "options", "counts", "texts"} <= set(result)
    assert result["versions"]["vllm"].startswith("0.32")
    assert len(result["counts"]) == 10
    for cell in result["counts"]:
        for arm in runner.ARMS:
            (one,) = cell["runs"][arm]
            assert len(one["records"]) == one["requests"] > 0
    log = (folder / "ab-counts-stock.log").read_text()
    assert "vllm-radix" not in log, "the plugin was loaded in the stock arm"


@pytest.mark.parametrize("name", ["few-shot", "chat", "agents", "documents"])
def test_under_pressure_fewer_tokens_are_computed(run, name):
    cell = dict(cells(run[1], loaded=True))[name]
    assert 3.5 < cell["pressure"] < 4.5
    assert report.computed(cell, "radix") < report.computed(cell, "stock")


def test_the_control_computes_as_many(run):
    for loaded in (True, False):
        cell = dict(cells(run[1], loaded))["control"]
        stock, radix = (report.computed(cell, arm) for arm in runner.ARMS)
        assert 0.99 * stock <= radix <= stock, "shares no more than chance openings"
        steps = {cell["runs"][arm][0]["engine_steps"] for arm in runner.ARMS}
        assert len(steps) == 1


def test_what_fits_computes_no_more_and_where_prefixes_end_in_blocks_less(run):
    fewer = set()
    for name, cell in cells(run[1], loaded=False):
        stock, radix = (report.computed(cell, arm) for arm in runner.ARMS)
        assert radix <= stock, name
        if radix < stock:
            fewer.add(name)
    assert {"chat", "agents"} <= fewer, "no hits inside blocks"


def test_the_same_prompts_get_the_same_answers(run):
    for cell in run[1]["counts"]:
        first = {
            arm: {
                record["id"]: record["output"]
                for record in cell["runs"][arm][0]["records"]
            }
            for arm in runner.ARMS
        }
        assert first["stock"] == first["radix"], cell["workload"]


@pytest.mark.parametrize("arm", runner.ARMS)
def test_a_replay_without_a_model_agrees_exactly(run, arm):
    """On ten loads: tokens computed, steps, and each request's own hits and waits."""
    result = run[1]
    options = runner.Options(**result["options"])
    workloads = runner.make_workloads(options, text=False)
    radix = "radix:" + json.dumps(options.radix)
    scheduler = replay.parse_arm("stock" if arm == "stock" else radix)
    settings = replay.Options(
        [options.blocks],
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    assert len(workloads) == len(result["counts"])
    for work, cell in zip(workloads, result["counts"], strict=True):
        (real,) = cell["runs"][arm]
        answers = {record["id"]: record["output"] for record in real["records"]}
        outcome = replay.run_arm(
            scheduler,
            work.roots,
            options.blocks,
            settings,
            longest_path(root for work in workloads for root in work.roots),
            answers=answers,
        )
        assert outcome.computed_prompt_tokens == real["computed_prompt_tokens"]
        assert outcome.engine_steps == real["engine_steps"]
        for key in ("cached_tokens", "preemptions"):
            found = {record.id: getattr(record, key) for record in outcome.records}
            assert found == {record["id"]: record[key] for record in real["records"]}
        steps = {record.id: record.steps for record in outcome.records}
        assert steps == {
            record["id"]: record["steps_to_first_token"] for record in real["records"]
        }
