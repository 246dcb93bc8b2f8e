"""The real engine with the tiny model: the A/B's claims, small and as a test."""

import json

import pytest

from vllm_radix.cli import main
from vllm_radix_bench import ab, report

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """One small A/B of counts: all workloads, under pressure and not."""
    folder = tmp_path_factory.mktemp("ab")
    output = folder / "ab.json"
    words = ["ab", "--model", tiny, "--no-texts", "--repeats", "1", "--blocks", "64"]
    words += ["--radix", '{"max_overtakes": 32}', "--output", str(output)]
    status = main([*words, "--load-format", "dummy"])
    return status, json.loads(output.read_text()), folder


def cells(result, loaded):
    for cell in result["counts"]:
        if (cell["pressure"] > 1) == loaded:
            yield cell["workload"], cell


def test_it_exits_with_0_and_writes_everything(run):
    status, result, folder = run
    assert status == 0
    assert {"versions", "options", "counts", "texts"} <= set(result)
    assert result["versions"]["vllm"].startswith("0.32")
    assert len(result["counts"]) == 10
    for cell in result["counts"]:
        for arm in ab.ARMS:
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
        stock, radix = (report.computed(cell, arm) for arm in ab.ARMS)
        assert 0.99 * stock <= radix <= stock, "shares no more than chance openings"
        steps = {cell["runs"][arm][0]["engine_steps"] for arm in ab.ARMS}
        assert len(steps) == 1


def test_what_fits_computes_no_more_and_where_prefixes_end_in_blocks_less(run):
    fewer = set()
    for name, cell in cells(run[1], loaded=False):
        stock, radix = (report.computed(cell, arm) for arm in ab.ARMS)
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
            for arm in ab.ARMS
        }
        assert first["stock"] == first["radix"], cell["workload"]
