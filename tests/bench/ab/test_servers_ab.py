"""The command `ab` on servers that are stand-ins: real processes, ports and faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab import run, serve_options, servers
from vllm_radix_bench.ab.servers import ServerSpec, plugins_of
from vllm_radix_bench.report import output as output_module
from vllm_radix_bench.report.output import alone

STUB = str(Path(__file__).parents[2] / "support" / "stub_server.py")
PIECES = 8
"""Of `words`: two workloads, one round and the answers', two arms."""

pytestmark = pytest.mark.timeout(300)


def stub_command(self, port):
    return [sys.executable, STUB, "--port", str(port), *self.options]


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(ServerSpec, "command", stub_command)
    monkeypatch.delenv("STUB_FAULT", raising=False)


@pytest.fixture
def words(tiny, tmp_path):
    made = ["ab", tiny, "--num-gpu-blocks-override", "64", "--rounds", "1"]
    made += ["--workloads", "few-shot", "--together", "--pressure", "3"]
    return [*made, "--output", str(tmp_path / "out" / "ab.json")]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "ab.json"


def engines(folder):
    """Return those processes of the stubs' engines that still run."""
    found = []
    for log in folder.glob("ab-*.log"):
        for number in re.findall(r"engine (\d+)", log.read_text()):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(number))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def until_gone(folder, seconds=45):
    deadline = time.monotonic() + seconds
    while left := engines(folder):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)


def test_a_whole_run_on_both_servers(stubs, words, output, capsys):
    assert main(words) == ExitCode.GOOD
    out, err = capsys.readouterr()
    report = json.loads(output.read_text())
    by_name = {one["name"]: one for one in report["workloads"]}
    assert list(by_name) == ["few-shot", "control"]
    few = by_name["few-shot"]
    stock, radix = few["counts"]["stock"], few["counts"]["radix"]
    assert stock["prompt_tokens"] == radix["prompt_tokens"]
    assert radix["computed_tokens"] < stock["computed_tokens"]
    # The stand-in keeps everything and finds it to the token.
    last = few["requests"]
    assert few["fewest_tokens"] <= radix["computed_tokens"]
    assert radix["computed_tokens"] <= few["fewest_tokens"] + last
    assert few["answers"] == {
        "compared": few["requests"], "different": 0, "beyond_doubt": 0,
    }  # fmt: skip
    control = by_name["control"]["counts"]
    assert control["stock"]["computed_tokens"] == control["stock"]["prompt_tokens"]
    assert report["setup"]["cache"] == {"blocks": 64, "block_size": 16, "tokens": 1024}
    assert report["setup"]["together"] is True
    assert out.rstrip().endswith(report["sentence"])
    assert "radix computed" in report["sentence"]
    assert "no intervals" in out and any("5 rounds" in w for w in report["warnings"])
    rounds = [(p["round"], p["arm"]) for p in report["pieces"]]
    assert sorted(rounds) == sorted([(r, a) for r in (0, 1) for a in servers.ARMS] * 2)
    lines = [line for line in err.splitlines() if "to go" in line]
    assert len(lines) == PIECES - 1
    assert not engines(output.parent)
    assert {p.name for p in output.parent.iterdir()} == {
        "ab.json", "ab.html", "ab-stock.log", "ab-radix.log",
    }  # fmt: skip


def test_the_report_fits_its_schema_and_becomes_a_page(stubs, words, output, tmp_path):
    import jsonschema

    page = tmp_path / "page.html"
    assert main([*words, "--html", str(page), "--rounds", "5"]) == ExitCode.GOOD
    report = json.loads(output.read_text())
    schema = Path(servers.__file__).with_name("report.schema.json")
    jsonschema.validate(report, json.loads(schema.read_text()))
    text = page.read_text()
    assert "few-shot" in text and "<svg" in text
    times = report["workloads"][0]["times"]["ttft_mean"]
    assert times["low"] <= times["ratio"] <= times["high"]
    assert len(times["rounds"]) == 5


def test_one_server_at_a_time_gives_the_same_counts(stubs, words, output):
    assert main(words) == ExitCode.GOOD
    together = json.loads(output.read_text())
    alone = [word for word in words if word != "--together"]
    assert main([*alone, "--in-turns"]) == ExitCode.GOOD
    in_turns = json.loads(output.read_text())
    assert in_turns["setup"]["together"] is False
    for one, other in zip(together["workloads"], in_turns["workloads"], strict=True):
        assert one["counts"] == other["counts"]


def test_a_matrix_runs_every_cell(stubs, words, output):
    extra = ["--matrix-blocks", "32", "96", "--matrix-rate", "400", "inf"]
    given = [w for w in words if w not in ("--num-gpu-blocks-override", "64")]
    assert main([*given, *extra]) == ExitCode.GOOD
    report = json.loads(output.read_text())
    cells = {
        (one["name"], one["cell"]["blocks"], one["cell"]["rate"])
        for one in report["workloads"]
    }
    assert cells == {
        (name, blocks, rate)
        for name in ("few-shot", "control")
        for blocks in (32, 96)
        for rate in (400.0, None)
    }


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("never up@stock", "the stock server ended early with exit status 1; its log"),
        ("never up@radix", "the radix server ended early with exit status 1; its log"),
        ("die@radix", "the radix server ended early with exit status 7"),
        ("kill@radix", "the radix server was killed by signal 9 (out of memory?)"),
        ("kill@stock", "the stock server was killed by signal 9 (out of memory?)"),
        ("hang@radix", "the radix server hangs: it has had requests for 2 s"),
        ("slow@stock", "the stock server was not ready after 3 s (--ready-timeout)"),
        ("no metrics", "the stock server has no metrics"),
        ("refuse@radix", "failed every request (HTTP status 400: too long)"),
        ("other cache@radix", "has a KV cache of 1,040 tokens, and the other arm's"),
    ],
)
def test_a_fault_of_a_server_is_told_and_nothing_runs_on(
    fault, said, stubs, words, output, monkeypatch, capsys
):
    monkeypatch.setenv("STUB_FAULT", fault)
    extra = ["--stall-timeout", "2", "--ready-timeout", "3"]
    if not fault.startswith("slow"):
        extra[-1] = "60"
    assert main([*words, *extra]) == ExitCode.ENGINE
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if "vllm-radix ab: the" in line)
    assert said in line, err
    if fault.startswith("never up"):
        assert "RuntimeError: no memory for the stub" in err
    if fault.startswith("die"):
        assert err.rstrip().endswith("ValueError: the stub was told to die")
    assert not output.exists()
    until_gone(output.parent)


def test_what_was_measured_before_a_fault_is_gone_on_with(
    stubs, words, output, monkeypatch, capsys
):
    sent = []
    send = run.send

    async def failing(load, server, *rest):
        if len(sent) == 5 + 2:  # each server is warmed, too
            raise server.error("died")
        sent.append((load.name, server.arm))
        return await send(load, server, *rest)

    monkeypatch.setattr(run, "send", failing)
    assert main(words) == ExitCode.ENGINE
    assert f"5 of {PIECES} pieces are kept" in capsys.readouterr().err
    monkeypatch.setattr(run, "send", send)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume", "--seed", "7"])
    assert stop.value.code == ExitCode.INPUT
    assert "--seed was 0, is 7" in capsys.readouterr().err
    assert main([*words, "--resume"]) == ExitCode.GOOD
    # A round that only one arm has run is run again by both.
    assert f"--resume: 4 of {PIECES} pieces are in" in capsys.readouterr().err
    report = json.loads(output.read_text())
    assert len(report["pieces"]) == PIECES
    assert not output.with_name("ab.json.unfinished").exists()


def test_other_answers_are_a_verdict(stubs, words, output, monkeypatch, capsys):
    monkeypatch.setenv("STUB_FAULT", "other@radix")
    assert main(words) == ExitCode.VERDICT
    out = capsys.readouterr().out
    report = json.loads(output.read_text())
    answers = report["workloads"][0]["answers"]
    assert answers["different"] == answers["beyond_doubt"] == answers["compared"] > 0
    assert "MISS  few-shot: 0 of" in out


def test_failed_requests_are_told(stubs, words, output, monkeypatch, capsys):
    monkeypatch.setenv("STUB_FAULT", "refuse some@radix")
    assert main(words) == ExitCode.VERDICT
    out = capsys.readouterr().out
    assert re.search(
        r"few-shot: requests that failed: 0 with stock, \d+ with radix", out
    )


@pytest.mark.parametrize(
    ("gates", "code", "said"),
    [
        (["computed_tokens>1.5"], ExitCode.GOOD, "ok"),
        (["computed_tokens<0.9"], ExitCode.VERDICT, "MISS"),
        (["control:preemptions>=1"], ExitCode.VERDICT, "MISS"),
        (["few-shot:hit_rate<1"], ExitCode.GOOD, "ok"),
    ],
)
def test_fail_on(gates, code, said, stubs, words, capsys):
    assert main([*words, "--fail-on", *gates]) == code
    line = next(x for x in capsys.readouterr().out.splitlines() if "--fail-on" in x)
    assert line.split()[0] == said


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--port", "8000"], "--port: leave it away: ab chooses a free port"),
        (["--scheduler-cls", "x"], "--scheduler-cls: leave it away"),
        (["--disable-log-stats"], "--disable-log-stats: leave it away"),
        (["--max-num-sqs", "4"], "vllm serve: unrecognized arguments: --max-num-sqs 4"),
        (["--radix.polciy", "fcfs"], "unknown radix option 'polciy'"),
        (["--fail-on", "ttft>1"], "--fail-on: 'ttft' is no figure; allowed: ttft_mean"),
        (["--fail-on", "ttft_mean=1"], "--fail-on: 'ttft_mean=1' is not"),
        (["--fail-on", "ttft_mean>x"], "--fail-on: 'x' is no bound"),
        (["--limit", "3"], "--limit is of a --trace"),
        (["--trace", "/no/such"], "/no/such"),
        (["--rate", "3", "--matrix-rate", "4"], "--rate and --matrix-rate"),
        (["--config", "f.yaml"], "--config: leave it away: write its options out"),
        (["--disable-log-st"], "--disable-log-stats: leave it away"),
        (["--fail-on", "ttft_p99>1.1"], "a ratio of times takes 3 rounds or more"),
        (["--rounds", "0"], "argument --rounds: '0' is not a whole number from 1"),
        (["--", "--dataset-name", "nope"], "vllm bench serve: argument --dataset-name"),
        (["--", "--port", "1"], "vllm bench serve: --port: leave it away"),
    ],
)
def test_bad_input_starts_nothing(extra, said, words, output, monkeypatch, capsys):
    monkeypatch.setattr(servers.Server, "__post_init__", None)  # would raise
    with pytest.raises(SystemExit) as stop:
        main([*words, *extra])
    assert stop.value.code == ExitCode.INPUT
    err = capsys.readouterr().err
    assert err.startswith("vllm-radix ab: ") and said in err
    assert len(err.splitlines()) == 1
    assert not output.parent.exists()


def test_a_gate_names_a_workload_of_the_run(stubs, words, output, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--fail-on", "chat:hit_rate<1"])
    assert stop.value.code == ExitCode.INPUT
    said = "no workload is called 'chat'; allowed: few-shot, control"
    assert said in capsys.readouterr().err
    assert not output.exists()


def test_two_runs_do_not_write_to_one_file(stubs, words, output, capsys):
    with alone(output):
        assert main(words) == ExitCode.OUTPUT
    err = capsys.readouterr().err
    assert f"--output: another run is writing {output}" in err
    assert not output.exists()
    # What a run that has ended, or was killed, left of its lock is free.
    assert main(words) == ExitCode.GOOD


def test_a_wrong_line_of_a_trace_is_named(words, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"token_ids": [1, 2], "output_length": -1}\n')
    with pytest.raises(SystemExit) as stop:
        main([*words, "--trace", str(trace)])
    assert stop.value.code == ExitCode.INPUT
    said = capsys.readouterr().err
    assert f"{trace}, line 1" in said and "output_length" in said


@pytest.fixture
def small_disk(tmp_path):
    """A file system with little room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_nothing(
    stubs, words, small_disk, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(output_module.tempfile, "tempdir", None)
    send = run.send

    async def filling(*arguments):
        done = await send(*arguments)
        with suppress(OSError), (small_disk / "filler").open("wb") as file:
            file.write(b"x" * 400_000)
        return done

    monkeypatch.setattr(run, "send", filling)
    output = small_disk / "ab.json"
    assert main([*words, "--output", str(output)]) == ExitCode.OUTPUT
    out, err = capsys.readouterr()
    assert f"{output} cannot be written (No space left on device)" in err
    (where,) = (path for path in tmp_path.glob("ab-*.json"))
    assert f"Every figure is in {where}." in out
    assert len(json.loads(where.read_text())["workloads"]) == 2


def test_without_a_model_one_is_asked_for(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["ab", "--output", str(tmp_path / "ab.json")])
    assert stop.value.code == ExitCode.INPUT
    assert "name a model, as in `vllm-radix ab MODEL`" in capsys.readouterr().err


def test_another_s_server_is_never_measured(stubs, tmp_path, monkeypatch):
    """A server that does not listen itself, while another answers on its port."""
    spec = ServerSpec("stock", "m", ())
    with servers.running(spec, tmp_path / "ab", 60) as other:
        sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
        monkeypatch.setattr(ServerSpec, "command", lambda self, port: sleeper)
        (tmp_path / "second").mkdir()
        mine = servers.Server(spec, other.port, tmp_path / "second" / "log")
        try:
            with pytest.raises(servers.ServerError, match="another one answers"):
                mine.wait_until_ready(60)
        finally:
            mine.stop()
    until_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_nothing_running(
    number, words, output, tmp_path, monkeypatch
):
    """The command in a process of its own, stopped while it measures."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); "
        "from bench.ab.test_servers_ab import ServerSpec, stub_command; "
        "ServerSpec.command = stub_command; "
        "from vllm_radix.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    tests = str(Path(__file__).parents[2])
    env = {**os.environ, "STUB_FAULT": "hang@radix"}
    command = subprocess.Popen(
        [sys.executable, "-c", code, tests, *words],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not output.with_name("ab.json.unfinished").exists():
        assert command.poll() is None, command.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    assert engines(output.parent)
    command.send_signal(number)
    _, err = command.communicate(timeout=60)
    until_gone(output.parent)
    if number == signal.SIGINT:
        assert command.returncode == ExitCode.INTERRUPTED
        assert "interrupted; 1 of 8 pieces are kept in" in err
    assert output.with_name("ab.json.unfinished").exists()
    assert not output.exists()


def test_the_plugin_is_loaded_in_one_arm_only():
    assert plugins_of("stock", {"VLLM_PLUGINS": "radix,mine"}) == ["mine"]
    assert plugins_of("radix", {"VLLM_PLUGINS": "mine"}) == ["mine", "radix"]
    assert "radix" in plugins_of("radix", {})
    assert set(plugins_of("radix", {})) - set(plugins_of("stock", {})) == {"radix"}


def test_options_of_radix_go_to_its_arm_only(tiny):
    words = [tiny, "--max-num-seqs", "8", "--radix.patience", "0.5", "--seed=3"]
    read = serve_options.read_serve([*words, "--radix", '{"hold": false}'])
    assert read.words == ("--max-num-seqs", "8", "--seed=3")
    assert read.radix == {"patience": 0.5, "hold": False}
    stock, radix = read.spec("stock", ("--x",)), read.spec("radix", ("--x",))
    assert stock.options == (*read.words, "--x")
    assert radix.options == (*stock.options, "--radix", json.dumps(read.radix))


def test_a_report_shows_no_secrets():
    words = ["--api-key", "sk-1", "sk-2", "--hf-token=hf", "--max-num-seqs", "8"]
    assert serve_options.shown(words) == [
        "--api-key", "***", "***", "--hf-token=***", "--max-num-seqs", "8",
    ]  # fmt: skip


def test_an_option_may_have_the_value_that_names_the_model(tiny):
    words = ["--tokenizer", tiny, "--max-num-seqs", "8", tiny]
    read = serve_options.read_serve(words)
    assert read.words == ("--tokenizer", tiny, "--max-num-seqs", "8")
    assert read.model == read.tokenizer == tiny


def test_what_failed_in_one_round_is_a_verdict(stubs, words, output, monkeypatch):
    rounds = []
    send = run.send

    async def failing(load, server, *rest):
        found, kept = await send(load, server, *rest)
        rounds.append(server.arm)
        if len(rounds) == 6:
            kept["counts"]["errors"] = 5
            kept["failures"] = ["HTTP status 500"]
        return found, kept

    monkeypatch.setattr(run, "send", failing)
    assert main([*words, "--rounds", "5"]) == ExitCode.VERDICT
    report = json.loads(output.read_text())
    assert sum(w["counts"][a]["errors"] for w in report["workloads"]
               for a in servers.ARMS) == 5  # fmt: skip
    assert ["HTTP status 500"] in [piece["failures"] for piece in report["pieces"]]


@pytest.mark.parametrize(("minutes", "rounds"), [(0.001, 1), (60, 3)])
def test_each_size_of_the_cache_has_its_part_of_the_budget(
    minutes, rounds, stubs, words, output, monkeypatch
):
    given = [w for w in words if w not in ("--num-gpu-blocks-override", "64")]
    monkeypatch.setattr("vllm_radix_bench.ab.cli._minutes", float)
    extra = ["--matrix-blocks", "32", "64", "--rounds", "3"]
    assert main([*given, *extra, "--budget", str(max(0.1, minutes))]) in (0, 1)
    report = json.loads(output.read_text())
    per_cell = {}
    for piece in report["pieces"]:
        key = piece["workload"], piece["blocks"]
        per_cell.setdefault(key, set()).add(piece["round"])
    assert len(per_cell) == 4
    assert all(len(found) - 1 >= 1 for found in per_cell.values())
    if minutes > 1:
        assert all(len(found) - 1 == rounds for found in per_cell.values())
