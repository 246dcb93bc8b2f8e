"""GuideLLM as a load of `ab`: its report, and a program that behaves as it does.

`guidellm_report.json` is cut from reports of GuideLLM 0.8.1 that asked a real server.
"""

import asyncio
import copy
import json
import re
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from bench.ab.test_servers_ab import stub_command, until_gone

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab import servers
from vllm_radix_bench.ab.client import Answer, Sending
from vllm_radix_bench.ab.guidellm import GuideLLM, answers_of
from vllm_radix_bench.ab.run import _seconds
from vllm_radix_bench.ab.servers import ServerSpec

FOLDER = Path(__file__).parent
DOUBLE = FOLDER.parents[1] / "support" / "guidellm_double.py"
REPORT = json.loads((FOLDER / "guidellm_report.json").read_text())
DATA = ["--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=4"]
COUNT = ["--constraint", "kind=max_requests,count=6"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def guidellm(monkeypatch, tmp_path):
    """The stand-in, where the program is looked for; returns the file of its calls."""
    program = tmp_path / "bin" / "guidellm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {DOUBLE} "$@"\n')
    program.chmod(0o755)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("GUIDELLM_CALLS", str(calls))
    for name in ("GUIDELLM", "GUIDELLM_FAULT", "GUIDELLM_DOUBLE", "STUB_FAULT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ServerSpec, "command", stub_command)
    return calls


@pytest.fixture
def words(tiny, tmp_path):
    made = ["ab", tiny, "--num-gpu-blocks-override", "64", "--rounds", "1"]
    made += ["--together", "--seed", "5", "--output", str(tmp_path / "out" / "ab.json")]
    return [*made, "--load", "guidellm"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "ab.json"


def test_the_answers_of_a_real_report():
    *good, bad = answers_of(REPORT)
    requests = REPORT["benchmarks"][0]["requests"]
    assert [one.prompt_tokens for one in good] == [118, 118, 173, 118]
    for one, request in zip(good, requests["successful"], strict=True):
        # What GuideLLM says of it.
        assert one.ttft * 1000 == pytest.approx(request["time_to_first_token_ms"])
        assert one.tpot * 1000 == pytest.approx(request["inter_token_latency_ms"])
        assert one.ttft < one.e2e <= request["request_latency"]
        assert "".join(map(chr, one.output)) == request["output"] == "是ESCO是ESCO"
        assert not one.error
    assert bad.error.startswith("HTTPStatusError(\"Client error '404 Not Found' for")
    assert "\\n" not in bad.error and bad.ttft is None
    assert len({one.id for one in (*good, bad)}) == 5


def test_a_request_is_known_by_what_was_sent():
    """In another run it has another id, and another place in the report."""
    other = copy.deepcopy(REPORT)
    found = other["benchmarks"][0]["requests"]
    found["successful"].reverse()
    for request in found["successful"]:
        request["request_id"] = f"other {request['request_id']}"
    before = [one.id for one in answers_of(REPORT)[:4]]
    assert [one.id for one in answers_of(other)[:4]] == before[::-1]
    # The same twice is two requests.
    found["successful"].append(copy.deepcopy(found["successful"][0]))
    again = [one.id for one in answers_of(other)[:5]]
    assert len(set(again)) == 5 and set(before) < set(again)


def test_requests_without_tokens_or_end_have_failed():
    report = copy.deepcopy(REPORT)
    requests = report["benchmarks"][0]["requests"]
    cut_off, empty = requests["successful"][:2]
    requests["successful"], requests["incomplete"] = [empty], [cut_off]
    empty["info"]["timings"]["first_token_iteration"] = None
    errors = [one.error for one in answers_of(report)]
    assert errors[0] == "no token came"
    assert errors[2] == "GuideLLM ended before it was answered"


def test_a_run_takes_as_long_as_its_requests():
    early = Answer("early", ttft=0.5, e2e=2.0, sent=100.0)
    late = Answer("late", ttft=0.5, e2e=1.0, sent=103.0)
    assert _seconds([late, early, Answer("lost", error="x")], 60.0) == 4.0
    assert _seconds([Answer("own client", ttft=0.5, e2e=1.0)], 60.0) == 60.0


def test_a_whole_run(guidellm, words, output, capsys):
    assert main([*words, "--", *DATA, *COUNT]) == ExitCode.GOOD
    report = json.loads(output.read_text())
    schema = Path(servers.__file__).with_name("report.schema.json")
    jsonschema.validate(report, json.loads(schema.read_text()))
    mine, control = report["workloads"]
    assert (mine["name"], mine["load"]) == ("guidellm: synthetic_text", "guidellm")
    assert mine["what"] == "guidellm run " + " ".join([*DATA, *COUNT])
    assert mine["requests"] == 6 and control["is_control"]
    stock, radix = mine["counts"]["stock"], mine["counts"]["radix"]
    assert stock["prompt_tokens"] == radix["prompt_tokens"] == 6 * 48
    assert radix["computed_tokens"] < stock["computed_tokens"]
    assert mine["answers"] == {"compared": 6, "different": 0, "beyond_doubt": 0}
    assert report["versions"]["guidellm"] == "0.8.1"
    assert report["setup"]["guidellm_options"] == [*DATA, *COUNT]
    assert report["setup"]["bench_options"] is None
    calls = [json.loads(line) for line in guidellm.read_text().splitlines()]
    assert len(calls) == 4  # two rounds, two arms
    assert len({call["spec"]["backend"]["target"] for call in calls}) == 2
    for call in calls:
        spec = call["spec"]
        assert spec["backend"]["model"] == "stub"
        assert spec["backend"]["extras"] == {"body": {"temperature": 0}}
        assert spec["seed"] == {"kind": "static", "value": 5}
        given = call["words"]
        profile = json.loads(given[given.index("--profile") + 1])
        assert profile == {"kind": "throughput", "max_concurrency": None}
        assert not Path(spec["outputs"][0]["path"]).parent.exists()


@pytest.mark.parametrize(
    ("extra", "after", "profile"),
    [
        (
            ["--rate", "50"],
            [],
            {"kind": "poisson", "rate": 50, "max_concurrency": None},
        ),
        (["--concurrency", "3"], [], {"kind": "throughput", "max_concurrency": 3}),
        ([], ["--profile=kind=concurrent,streams=2"], None),
    ],
)
def test_requests_are_sent_as_ab_is_told_or_by_the_profile(
    extra, after, profile, guidellm, words
):
    assert main([*words, *extra, "--", *DATA, *COUNT, *after]) == ExitCode.GOOD
    given = json.loads(guidellm.read_text().splitlines()[0])["words"]
    if profile is None:
        assert after[0] in given and "--profile" not in given
    else:
        assert json.loads(given[given.index("--profile") + 1]) == profile


def test_failed_requests_are_told(guidellm, words, monkeypatch, capsys):
    monkeypatch.setenv("STUB_FAULT", "refuse some@radix")
    assert main([*words, "--", *DATA, *COUNT]) == ExitCode.VERDICT
    # Those of the answers' round are counted, too.
    said = "guidellm: synthetic_text: requests that failed: 0 with stock, "
    found = re.search(said + "([0-9]+)", " ".join(capsys.readouterr().out.split()))
    assert found and int(found[1]) > 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("ends", "guidellm ended with exit status 1; its log is"),
        ("sends nothing", "guidellm sent no request; its log is"),
        ("writes nothing", "left no report that ab reads (FileNotFoundError"),
        ("report of another version", "its version is 3, not 2"),
    ],
)
def test_a_fault_of_guidellm_is_told(
    fault, said, guidellm, words, output, monkeypatch, capsys
):
    monkeypatch.setenv("GUIDELLM_FAULT", fault)
    assert main([*words, "--", *DATA, *COUNT]) == ExitCode.ENGINE
    err = capsys.readouterr().err
    assert said in err
    if fault == "ends":
        assert err.rstrip().endswith("RuntimeError: no such data")
    assert not output.exists()
    until_gone(output.parent)


def test_a_cancelled_load_leaves_nothing_running(guidellm, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDELLM_FAULT", "hangs")
    load = GuideLLM((*DATA, *COUNT), tmp_path / "ab-guidellm.log", tiny)

    async def stopped(server):
        sent = asyncio.ensure_future(load.send(server, Sending()))
        deadline = time.monotonic() + 60
        while "engine" not in (load.log.read_text() if load.log.exists() else ""):
            assert time.monotonic() < deadline and not sent.done()
            await asyncio.sleep(0.1)
        sent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sent

    with servers.running(ServerSpec("stock", "m", ()), tmp_path / "ab", 60) as server:
        asyncio.run(stopped(server))
    until_gone(tmp_path)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (["--output", "kind=json,path=x"], "--output: leave it away"),
        (["--tokenizer=kind=hf_auto,model=x"], "--tokenizer: leave it away"),
        (["--config", "mine.json"], "--config: leave it away"),
        (["-cmine.json"], "-c: leave it away"),
        (["--backend", "kind=openai_http,target=http://x"], "--backend: leave target"),
        (["--backend", '{"kind": "openai_http", "model": "x"}'], "leave model away"),
        (["--backend", "kind=openai_http,api-key=x"], "leave api_key away"),
        (["--backend", "{kind: openai_http}"], "neither JSON nor key=value,..."),
        (["--backend", "kind=vllm_python"], "'vllm_python' is not openai_http"),
        (["--profile", "kind=sweep"], "with sweep a faster server gets other requests"),
        (["--constraint", "kind=max_duration,seconds=9"], "with max_duration a faster"),
        (["--nonsense"], "guidellm run: No such option: --nonsense"),
    ],
)
def test_bad_options_start_nothing(
    after, said, guidellm, words, output, monkeypatch, capsys
):
    monkeypatch.setattr(servers.Server, "__post_init__", None)  # would raise
    with pytest.raises(SystemExit) as stop:
        main([*words, "--", *DATA, *COUNT, *after])
    assert stop.value.code == ExitCode.INPUT
    err = capsys.readouterr().err
    assert err.startswith("vllm-radix ab: ") and said in err
    assert len(err.splitlines()) == 1
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], "--load guidellm: give its options after --"),
        (["--", *DATA], "synthetic data has no end: add --constraint"),
        (
            ["--rate", "3", "--", *DATA, *COUNT, "--profile", "kind=synchronous"],
            "--rate and guidellm's --profile: give one of them",
        ),
    ],
)
def test_options_that_do_not_go_together(extra, said, guidellm, words, output, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, *extra])
    assert stop.value.code == ExitCode.INPUT
    assert said in capsys.readouterr().err
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("PATH", "/usr/bin:/bin"), "the program guidellm is not there: pip install"),
        (("GUIDELLM", "/no/such"), "/no/such, named by $GUIDELLM, is not there: pip"),
        (("GUIDELLM_DOUBLE", "0.7.3"), "is version 0.7.3, and ab knows 0.8: pip"),
        (("GUIDELLM_DOUBLE", "0.80.1"), "is version 0.80.1, and ab knows 0.8: pip"),
        (("GUIDELLM", "/bin/true"), "/bin/true is version unknown, and ab knows 0.8"),
    ],
)
def test_a_program_that_cannot_be_used(
    setting, said, guidellm, words, output, monkeypatch, capsys
):
    monkeypatch.setenv(*setting)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--", *DATA, *COUNT])
    assert stop.value.code == ExitCode.INPUT
    err = capsys.readouterr().err
    assert said in err and "pip install guidellm==0.8.1" in err
    assert len(err.splitlines()) == 1
    assert not output.parent.exists()


def test_guidellm_is_no_dependency():
    from importlib.metadata import requires

    assert not [line for line in requires("vllm-radix") if "guidellm" in line]
