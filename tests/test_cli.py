"""The command `vllm-radix`: bad input is named, and exits with 2."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_radix
from vllm_radix.cli import COMMANDS, main
from vllm_radix.config import RadixConfig
from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab.offline import runner

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: command"),
        (["ab", "--offline", "--workloads", "chats"], "invalid choice: 'chats'"),
        (["ab", "--offline", "--blocks", "3"], "'3' is not a whole number from 16 to"),
        (["ab", "--offline", "--pressure", "x"], "'x' is not a number from 0.1 to 100"),
        (["ab", "--offline", "--pressure", "nan"], "'nan' is not a number from 0.1"),
        (["ab", "--offline", "--pressure", "inf"], "'inf' is not a number from 0.1"),
        (
            ["ab", "--offline", "--repeats", "1.5"],
            "'1.5' is not a whole number from 1 to",
        ),
        (["ab", "--offline", "--radix", '{"x": 1}'], "unknown radix option 'x'"),
        (["ab", "--offline", "--radix", "prefix"], "JSON object"),
        (
            ["ab", "--offline", "--model", "/no/such"],
            "--model: '/no/such': no such folder",
        ),
        (
            ["ab", "--offline", "--model", "tests"],
            "--model: 'tests' is not a model folder",
        ),
        (
            ["ab", "--offline", "--model", "some/model"],
            "--model: 'some/model' is no folder here",
        ),
        (
            ["ab", "--offline", "--text-model", "/no"],
            "--text-model: '/no': no such folder",
        ),
        (["ab", "--offline", "--polciy"], "unrecognized arguments: --polciy"),
        (["replay", "--polciy"], "unrecognized arguments: --polciy"),
        (["replay", "--blocks"], "expected at least one argument"),
        (["replay"], "give a trace, or --workload"),
    ],
)
def test_bad_input_is_named_in_one_line_and_exits_with_2(
    words, message, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)  # where the embedded models are
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{' '.join(['vllm-radix', *words[:1]])}: ")
    assert message in line


def test_without_the_embedded_models_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for clone in (False, True):
        if clone:
            (tmp_path / "tools").mkdir()
            (tmp_path / "tools" / "setup_env.py").touch()
        with pytest.raises(SystemExit) as stop:
            main(["ab", "--offline"])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("vllm-radix ab: --model: name a model: a folder")
        assert ("`make setup`" in line) == clone
        assert not (tmp_path / "results").exists(), "something was written"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_exit_code(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for code in ExitCode:
        assert f"{code:d} " in shown[shown.index("exit status:") :]


def test_what_breaks_before_the_run_is_no_verdict_either(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "ab", ("", "no.such.module"))
    assert main(["ab"]) == ExitCode.UNEXPECTED
    said = capsys.readouterr().err
    assert said.startswith("vllm-radix ab: unexpected ModuleNotFoundError: No module")
    Path(re.search(r"traceback is in (\S+),", said)[1]).unlink()


def python(words, after="", **env):
    """Run the command in a process of its own, silent as for a user."""
    line = f"{sys.executable} -m vllm_radix.cli {shlex.join(words)} {after}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **env},
    )


SMALL = ["replay", "--workload", "chat", "--blocks", "600", "--no-oracle"]


def test_a_reader_that_stops_reading_changes_no_exit_code(tmp_path):
    words = [*SMALL, "--output", str(tmp_path / "a.json")]
    done = python(words, "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_a_replay_is_as_silent_as_it_can_be(tmp_path):
    done = python([*SMALL, "--output", str(tmp_path / "a.json")], COLUMNS="80")
    assert done.returncode == 0
    stock, radix = done.stderr.splitlines()
    assert re.fullmatch(
        r"stock, 600 blocks: \d+ engine steps in \d+ s; .* to go", stock
    )
    assert re.fullmatch(r"radix, 600 blocks: \d+ engine steps in \d+ s", radix)
    assert done.stdout.startswith("Counts: the same in every run\n")
    assert "Cache: 600 blocks of 16 tokens (9,600 tokens, 1.3 GB)." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("With 600 blocks radix computed ")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == vllm_radix.__version__


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--blocks", "16", "--block-size", "4"], "raise --blocks or --block-size"),
        (["--text-blocks", "16", "--block-size", "4"], "raise --"),
        (["--model", "{bare}"], "no tokenizer to load"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    extra, message, tmp_path, monkeypatch, capsys, model_folder
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "ArmProcess", None)  # would raise if it were started
    words = ["ab", "--offline", "--output", str(tmp_path / "ab.json")]
    words += [w.format(tmp=tmp_path, bare=model_folder) for w in extra]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ab.json").exists()


def test_each_part_uses_its_own_model_s_tokenizer(monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "load_encode", lambda m: asked.append(m.name) or None)
    monkeypatch.setattr(runner, "build", lambda *args, **kwargs: None)
    options = runner.Options(model="a", load_format="auto", text_model="b")
    runner.make_workloads(options, text=False)
    runner.make_workloads(options, text=True)
    assert asked == ["a", "b"]


def test_a_quick_run_of_any_workload_compares_texts(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        runner, "all_workloads", lambda options: seen.append(options) or 1 / 0
    )
    for name in ("agents", "chat"):
        words = ["ab", "--offline", "--quick", "--workloads", name, "--debug"]
        main([*words, "--output", str(tmp_path / "ab.json")])
    assert [options.text_workloads for options in seen] == [["agents"], ["chat"]]
    # What the environment says is part of the record.
    assert seen[0].radix == RadixConfig.resolve().to_dict()


@pytest.mark.engine
def test_an_arm_that_dies_is_reported_with_its_log(tmp_path, tiny, capsys):
    model = tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(Path(tiny) / "tokenizer.json")
    output = tmp_path / "out" / "ab.json"
    words = [
        "ab",
        "--offline",
        "--model",
        str(model),
        "--no-texts",
        "--output",
        str(output),
    ]
    assert main(words) == 3
    said = capsys.readouterr().err
    assert "arm ended early with exit status 1; its log is" in said
    assert "no finished piece is kept" in said
    assert "Error" in said.splitlines()[-1], "not the cause"
    assert not output.exists()
