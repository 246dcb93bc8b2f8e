"""The command `ab` on arms that are not there: what it keeps, says and ends with."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.ab.offline import models, process, runner
from vllm_radix_bench.report import output as output_module
from vllm_radix_bench.report.output import OutputFile

PIECES = 12
"""Of WORDS: two workloads at one pressure, three times, on two arms."""


def answer(name, request):
    """Return what an arm would; radix computes half."""
    paths = []
    stack = [(str(i), turn) for i, turn in enumerate(request["roots"])]
    while stack:
        path, turn = stack.pop()
        paths.append((path, turn))
        stack += [(f"{path}.{i}", child) for i, child in enumerate(turn["children"])]
    tokens = sum(len(turn["tokens"]) for _, turn in paths)
    shared = name == "radix" and len({tuple(t["tokens"][:50]) for _, t in paths}) < len(
        paths
    )
    return {
        "requests": len(paths),
        "prompt_tokens": tokens,
        "cached_tokens": tokens // 2 * shared,
        "computed_prompt_tokens": tokens - tokens // 2 * shared,
        "engine_steps": 7,
        "engine": {"groups": [["FullAttentionSpec", 32]]},
        "preemptions": 0,
        "seconds": 2.0,
        "records": [
            {"id": path, "ttft": 0.1, "steps_to_first_token": 3, "output": [1, 2]}
            for path, _ in sorted(paths)
        ],
    }


class Arms:
    """Stands for both arms; says what was asked, and may fail at a piece."""

    def __init__(self):
        self.asked = []
        self.error = None
        self.at = None
        self.started = 0

    @contextmanager
    def __call__(self, settings, folder, label):
        self.started += 1
        yield {name: Arm(name, self) for name in runner.ARMS}


class Arm:
    def __init__(self, name, arms):
        self.name = name
        self.arms = arms

    def ask(self, request):
        if len(self.arms.asked) == self.arms.at:
            raise self.arms.error
        self.arms.asked.append(self.name)
        return answer(self.name, request)


@pytest.fixture
def arms(monkeypatch):
    made = Arms()
    monkeypatch.setattr(runner, "both_arms", made)
    return made


@pytest.fixture
def words(tiny, tmp_path):
    made = [
        "ab",
        "--offline",
        "--model",
        tiny,
        "--no-texts",
        "--pressure",
        "4",
        "--blocks",
        "32",
    ]
    made += ["--workloads", "few-shot", "control"]
    return [*made, "--output", str(tmp_path / "out" / "ab.json")]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "ab.json"


def unfinished(output):
    return output.with_name("ab.json.unfinished")


def test_a_whole_run_ends_with_its_sentence(arms, words, output, capsys):
    assert main(words) == ExitCode.GOOD
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert last.startswith("radix computed 50 % fewer prompt tokens (")
    assert f"Every request is in {output}." in out
    assert sorted(path.name for path in output.parent.iterdir()) == ["ab.json"]
    result = json.loads(output.read_text())
    assert [len(cell["runs"]["radix"]) for cell in result["counts"]] == [3, 3]
    assert len(arms.asked) == PIECES
    # A pair is A B, the next one B A: both meet a drift of the machine's speed.
    assert arms.asked[:4] == ["stock", "radix", "radix", "stock"]
    lines = [line for line in err.splitlines() if line.startswith("counts: ")]
    assert len(lines) == 1 + PIECES, "a line for each piece, without a terminal"
    assert "few-shot at 4.0x, stock, run 1 of 3: 0 s; about " in lines[1]
    assert "to go" not in lines[-1]
    assert "\r" not in err and "%|" not in err


@pytest.mark.parametrize("at", [0, 1, 6, PIECES - 1])
def test_an_interrupted_run_is_kept_and_gone_on_with(at, arms, words, output, capsys):
    arms.error, arms.at = KeyboardInterrupt(), at
    assert main(words) == ExitCode.INTERRUPTED
    err = capsys.readouterr().err
    assert not output.exists()
    if at:
        kept = f"{at} of {PIECES} pieces are kept in {unfinished(output)}: the same"
        assert f"vllm-radix ab: interrupted; {kept} command with --resume" in err
    else:
        assert "vllm-radix ab: interrupted; no finished piece is kept\n" in err
    arms.at, arms.asked = None, []
    assert main([*words, "--resume"]) == ExitCode.GOOD
    # A pair of which only one arm has run is run again: its times are compared.
    assert len(arms.asked) == PIECES - at // 2 * 2
    said = f"--resume: {at // 2 * 2} of {PIECES} pieces are in" if at > 1 else "nothing"
    assert said in capsys.readouterr().err
    assert not unfinished(output).exists()
    for cell in json.loads(output.read_text())["counts"]:
        assert all(len(runs) == 3 for runs in cell["runs"].values())


def test_a_run_goes_on_only_with_equal_options(arms, words, output, capsys):
    arms.error, arms.at = KeyboardInterrupt(), 5
    main(words)
    before = unfinished(output).read_text()
    others = ["--seed", "3", "--repeats", "4", "--radix", '{"patience": 2}']
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume", *others])
    assert stop.value.code == ExitCode.INPUT
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--seed was 0, is 3" in err and "--repeats was 3, is 4" in err
    assert "--radix patience was 1.0, is 2" in err
    assert "--blocks" not in err and "hold" not in err
    assert unfinished(output).read_text() == before
    unfinished(output).write_text("[]")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume"])
    assert "holds no unfinished run" in capsys.readouterr().err


def test_a_run_that_does_not_go_on_says_what_it_replaces(arms, words, output, capsys):
    arms.error, arms.at = KeyboardInterrupt(), 5
    main(words)
    arms.at, arms.asked = None, []
    assert main(words) == ExitCode.GOOD
    assert "this one starts anew and replaces it" in capsys.readouterr().err
    assert len(arms.asked) == PIECES


def test_texts_are_pieces_too(arms, words, output, tiny, capsys):
    words = [word for word in words if word != "--no-texts"]
    words += ["--text-model", tiny, "--repeats", "1"]
    arms.error, arms.at = KeyboardInterrupt(), 6
    assert main(words) == ExitCode.INTERRUPTED
    assert "6 of 8 pieces are kept" in capsys.readouterr().err
    arms.at, arms.asked, arms.started = None, [], 0
    assert main([*words, "--resume"]) == ExitCode.GOOD
    assert (len(arms.asked), arms.started) == (2, 1), "no engine for finished counts"
    texts = json.loads(output.read_text())["texts"]
    assert [cell["differences"] for cell in texts] == [[], []]


def test_a_dead_arm_is_told_with_what_is_kept(arms, words, output, capsys):
    arms.error, arms.at = process.ArmError("the radix arm died", "ERROR: it did"), 3
    assert main(words) == ExitCode.ENGINE
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("vllm-radix ab: the radix arm died; 3 of 12 pieces are")
    assert second == "ERROR: it did"


def test_a_crash_is_no_verdict(arms, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(output_module.tempfile, "tempdir", None)
    arms.error, arms.at = ZeroDivisionError("by what?"), 3
    assert main(words) == ExitCode.UNEXPECTED
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vllm-radix ab: unexpected ZeroDivisionError: by what?; the")
    assert "3 of 12 pieces are kept" in line
    (log,) = tmp_path.glob("vllm-radix-ab-*.log")
    assert str(log) in line and "raise self.arms.error" in log.read_text()
    arms.asked = []
    assert main([*words, "--debug"]) == ExitCode.UNEXPECTED
    assert capsys.readouterr().err.rstrip().endswith("ZeroDivisionError: by what?")
    assert len(list(tmp_path.glob("vllm-radix-ab-*.log"))) == 1


def test_a_full_disk_loses_nothing(arms, words, output, tmp_path, monkeypatch, capsys):
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(output_module.tempfile, "tempdir", str(spare))
    write = output_module._write

    def full(path, text, replace=True):
        if path.parent == output.parent and replace and len(arms.asked) > 3:
            raise OSError(28, "No space left on device")
        write(path, text, replace)

    monkeypatch.setattr(output_module, "_write", full)
    assert main(words) == ExitCode.OUTPUT
    out, err = capsys.readouterr()
    assert f"--output: {output} cannot be written (No space left on device)" in err
    (where,) = spare.glob("ab-*.json")
    assert f"Every request is in {where}." in out
    assert len(json.loads(where.read_text())["counts"]) == 2
    assert "radix computed 50 % fewer" in out
    assert not list(output.parent.iterdir()) and len(list(spare.iterdir())) == 1


def test_without_room_anywhere_the_result_is_printed(
    arms, words, output, monkeypatch, capsys
):
    write = output_module._write

    def full(path, text, replace=True):
        if replace:
            raise OSError(28, "No space left on device")
        write(path, text, replace)

    monkeypatch.setattr(output_module, "_write", full)
    assert main(words) == ExitCode.OUTPUT
    out, err = capsys.readouterr()
    assert err.count("nor can a temporary file") == 2, "once a file"
    result, _ = json.JSONDecoder().raw_decode(out[out.index("{\n") :])
    assert len(result["rows"]) == 2
    assert out.splitlines()[-1].startswith("radix computed 50 % fewer")


def test_what_cannot_be_written_is_refused_first(arms, words, tmp_path, capsys):
    for path, why in (
        (str(tmp_path), "is a folder, not a file"),
        ("/dev/null", "is not a regular file"),
        ("/proc/ab.json", "cannot be written"),
        ("/etc/passwd/ab.json", "cannot be written (its folder is a file)"),
    ):
        assert main([*words, "--output", path]) == ExitCode.OUTPUT
        err = capsys.readouterr().err
        assert err.startswith(f"vllm-radix ab: --output: {path} {why}")
        assert err.count("\n") == 1
    assert not arms.asked


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "link.json"
    path.symlink_to(tmp_path / "real.json")
    file = OutputFile(path)
    file.write("before")
    assert path.is_symlink() and path.read_text() == "before"
    monkeypatch.setattr(output_module.tempfile, "tempdir", str(tmp_path / "none"))

    def full(number):
        assert path.read_text() == "before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.os, "fsync", full)
    file.write("after")
    assert path.read_text() == "before" and file.unsaved == "after"
    assert len(list(tmp_path.iterdir())) == 2, "a part of the file was left"


def test_the_end_of_a_process_is_told_in_words():
    assert process.how_it_ended(3) == "ended early with exit status 3"
    assert process.how_it_ended(-9) == "was killed by signal 9 (out of memory?)"
    assert process.how_it_ended(-11) == "was killed by signal 11 (SIGSEGV)"
    assert process.how_it_ended(-99) == "was killed by signal 99"


def test_of_a_log_the_errors_are_shown():
    lines = ["INFO 11-26 [a.py:1] ERROR: none", *(["(Engine pid=1) INFO on"] * 20)]
    lines += ["WARNING Using custom scheduler class", "ERROR 11-26 [core.py:2] no room"]
    lines += ["Traceback (most recent call last):", '  File "x.py"']
    lines += ["torch.OutOfMemoryError: of 3 GiB", "INFO bye"]
    assert process.excerpt("\n".join(lines)).splitlines() == [
        "ERROR 11-26 [core.py:2] no room",
        "torch.OutOfMemoryError: of 3 GiB",
    ]
    log = "a\nb\nc\nterminate called\nINFO bye\n"
    assert process.excerpt(log).splitlines() == ["b", "c", "terminate called"]


def test_a_killed_arm_is_told_in_words(tmp_path, monkeypatch):
    """The arm's program is another one here, which kills itself."""
    code = "import os; print('ERROR gone', flush=True); "
    code += f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    popen = subprocess.Popen
    monkeypatch.setattr(
        process.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", code], **options),
    )
    log = tmp_path / "log"
    arm = process.ArmProcess("radix", settings(), log)
    with pytest.raises(process.ArmError) as error:
        arm.wait_until_ready()
    arm.stop()
    said = f"the radix arm was killed by signal 9 (out of memory?); its log is {log}"
    assert str(error.value) == said
    assert error.value.details == "ERROR gone"


def settings():
    return process.Settings("m", 32, 64, 4, 512, 1000, 0.4)


def test_a_log_that_cannot_be_written_names_the_option(tmp_path):
    with pytest.raises(output_module.OutputError, match=r"--output: the log .* cannot"):
        process.ArmProcess("radix", settings(), tmp_path / "none" / "log")


def test_a_model_may_be_a_name_on_the_hub(tmp_path, monkeypatch, tiny):
    """The hub's cache is a made-up one, and the hub out of reach."""
    import huggingface_hub.constants

    cache = tmp_path / "models--some--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert models.find("some/tiny", "--model") == "some/tiny"
    with pytest.raises(ValueError, match="not in the cache of the Hugging Face hub"):
        models.find("some/other", "--model")
    with pytest.raises(ValueError, match="no such model"):
        models.find("some/o ther", "--model")
    with pytest.raises(ValueError, match=r"no config\.json"):
        models.find(str(tmp_path), "--model")
