"""The command `vllm-radix`: bad input is named, and exits with 2."""

from pathlib import Path

import pytest

import vllm_radix
from vllm_radix.cli import main
from vllm_radix.config import RadixConfig
from vllm_radix_bench.ab import runner

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: command"),
        (["ab", "--workloads", "chats"], "invalid choice: 'chats'"),
        (["ab", "--blocks", "3"], "'3' is not a whole number from 16 to"),
        (["ab", "--pressure", "x"], "'x' is not a number from 0.1 to 100"),
        (["ab", "--pressure", "nan"], "'nan' is not a number from 0.1"),
        (["ab", "--pressure", "inf"], "'inf' is not a number from 0.1"),
        (["ab", "--repeats", "1.5"], "'1.5' is not a whole number from 1 to"),
        (["ab", "--radix", '{"x": 1}'], "unknown radix option 'x'"),
        (["ab", "--radix", "prefix"], "JSON object"),
        (["ab", "--model", "/no/such"], "--model: '/no/such' is not a model folder"),
        (["ab", "--text-model", "/no"], "--text-model: '/no' is not a model folder"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the embedded models are
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_embedded_models_setup_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["ab"])
    assert stop.value.code == 2
    assert "run `make setup`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "something was written"


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == vllm_radix.__version__


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--output", "{tmp}"], "is a folder, not a file"),
        (["--output", "/etc/passwd/ab.json"], "/etc/passwd"),
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
    words = ["ab", "--output", str(tmp_path / "ab.json")]
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


def test_interrupting_is_quiet_and_exits_with_130(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "run", interrupt)
    assert main(["ab", "--output", str(tmp_path / "ab.json")]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_quick_run_of_any_workload_compares_texts(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        runner, "run", lambda options, *rest: seen.append(options) or 1 / 0
    )
    for name in ("agents", "chat"):
        words = ["ab", "--quick", "--workloads", name]
        with pytest.raises(ZeroDivisionError):
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
    words = ["ab", "--model", str(model), "--no-texts", "--output", str(output)]
    assert main(words) == 3
    assert "arm ended early; its log ends:" in capsys.readouterr().err
    assert not output.exists()
