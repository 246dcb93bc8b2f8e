"""The command `vllm-radix`: bad input is named, and exits with 2."""

import pytest

import vllm_radix
from vllm_radix.cli import main
from vllm_radix_bench import ab


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: command"),
        (["ab", "--workloads", "chats"], "invalid choice: 'chats'"),
        (["ab", "--blocks", "3"], "'3' is not a whole number of at least 16"),
        (["ab", "--pressure", "x"], "'x' is not a number of at least 0.1"),
        (["ab", "--pressure", "nan"], "'nan' is not a number of at least 0.1"),
        (["ab", "--repeats", "1.5"], "'1.5' is not a whole number of at least 1"),
        (["ab", "--radix", '{"x": 1}'], "unknown radix option 'x'"),
        (["ab", "--radix", "prefix"], "JSON object"),
        (["ab", "--model", "/no/such"], "--model: '/no/such' is not a model folder"),
        (["ab", "--text-model", "/no"], "--text-model: '/no' is not a model folder"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(words, message, capsys):
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


def test_an_arm_that_dies_is_reported_with_its_log(tmp_path, monkeypatch, capsys):
    model = tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(ab, "make_workloads", lambda options, text: [])
    output = tmp_path / "out" / "ab.json"
    words = ["ab", "--model", str(model), "--no-texts", "--output", str(output)]
    assert main(words) == 1
    assert "arm ended early; its log ends:" in capsys.readouterr().err
    assert not output.exists()
