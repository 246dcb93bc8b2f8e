"""What the doctor finds: each kind of trouble, in a sentence that says what to do."""

import json
import sys
from importlib import metadata

import pytest

from support.toy_models import make_toy
from vllm_radix import plugin
from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.doctor import installation
from vllm_radix_bench.doctor.finding import Finding, Status, note, problem, starts
from vllm_radix_patches.patch import Patch
from vllm_radix_patches.registry import SMALLEST_MODEL

KV_CONNECTOR = json.dumps(
    {"kv_connector": "ExampleConnector", "kv_role": "kv_both",
     "kv_connector_extra_config": {"shared_storage_path": "/tmp/none"}}
)  # fmt: skip


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Return a function that asks for JSON; it returns the code and the findings."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def asked(*words):
        code = main(["doctor", "--json", *words])
        said = json.loads(capsys.readouterr().out)
        assert said["starts"] == (code == ExitCode.GOOD)
        findings = [Finding(**{**one, "status": Status(one["status"])})
                    for one in said["findings"]]  # fmt: skip
        return code, findings

    return asked


def of(findings, subject):
    return [one for one in findings if one.subject == subject]


def problems(findings):
    return [one for one in findings if one.status is Status.PROBLEM]


@pytest.fixture
def folder_of(tmp_path):
    """Return a function that makes a model folder of the smallest configuration."""

    def made(**fields):
        config = {**SMALLEST_MODEL, "num_hidden_layers": 2, **fields}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return made


def test_without_a_model_the_installation_is_looked_at(doctor):
    code, findings = doctor()
    assert code == ExitCode.GOOD and problems(findings) == []
    subjects = [one.subject for one in findings]
    for subject in ("Python", "vLLM", "vllm-radix", "plugin", "torch", "device"):
        assert len(of(findings, subject)) == 1, subject
    patches = [one for one in subjects if one.startswith("patch ")]
    assert patches == [f"patch {one.name}" for one in plugin.patches()]
    assert "model" not in subjects


def test_a_model_that_is_served(doctor, model_folder):
    code, findings = doctor(model_folder, "--max-num-seqs", "7", "--radix.patience=2")
    assert code == ExitCode.GOOD
    (cache,) = of(findings, "cache")
    assert cache.found == "full attention (1 group)"
    assert of(findings, "left to stock")[0].found == "nothing"
    assert of(findings, "options")[0].found == "patience=2"


@pytest.mark.parametrize(
    ("toy", "told"),
    [
        (
            "gemma3",
            "sliding windows of 128 tokens (2 groups), full attention (1",
        ),
        ("llama4", "attention within chunks of 256 tokens (3 groups), full attention"),
        ("granite4", "states (3 groups), full attention (1 group)"),
    ],
)
def test_hybrid_models_that_are_served(doctor, tmp_path, smollm2, toy, told):
    code, findings = doctor(make_toy(toy, tmp_path, smollm2))
    assert (code, problems(findings)) == (ExitCode.GOOD, [])
    assert of(findings, "cache")[0].found.startswith(told)


LFM2 = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "num_key_value_heads": 1,
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 3,
    "conv_dim": 32,
}


@pytest.mark.parametrize(
    ("fields", "options", "subject", "words"),
    [
        (LFM2, [], "cache", "short convolutions"),
        ({}, ["--no-enable-prefix-caching"], "model", "prefix caching is off"),
        (
            {"layer_types": ["full_attention", "sliding_attention"],
             "sliding_window": 64, "model_type": "qwen2", "use_sliding_window": True,
             "max_window_layers": 1, "architectures": ["Qwen2ForCausalLM"]},
            ["--kv-transfer-config", KV_CONNECTOR],
            "cache",
            "a KV connector",
        ),
        ({}, ["--radix.attention", "grouped", "--worker-cls", "x.Y"], "attention",
         "the worker class x.Y"),
        ({}, ["--radix.public_prefix", '{"first_tokens": 64}',
              "--kv-transfer-config", KV_CONNECTOR],
         "public_prefix", "a KV connector"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_and_left_to_stock_if_asked(
    doctor, folder_of, fields, options, subject, words
):
    model = folder_of(**fields)
    code, findings = doctor(model, *options)
    assert code == ExitCode.VERDICT
    (refused,) = problems(findings)
    assert refused.subject == subject and words in refused.found + refused.fix
    assert 'on_unsupported="stock"' in refused.fix
    code, findings = doctor(model, *options, "--radix.on_unsupported", "stock")
    assert (code, problems(findings)) == (ExitCode.GOOD, [])
    noted = [one for one in of(findings, subject) if one.status is Status.NOTE]
    assert [one.fix for one in noted] == ["stock vLLM serves it, as asked"]


def test_what_a_flag_leaves_to_stock_is_told(doctor, model_folder):
    code, findings = doctor(
        model_folder, "--scheduling-policy", "priority",
        "--kv-transfer-config", KV_CONNECTOR,
    )  # fmt: skip
    assert code == ExitCode.GOOD
    (left,) = of(findings, "left to stock")
    assert "a KV connector" in left.found and left.status is Status.NOTE
    _, findings = doctor(model_folder, "--scheduling-policy", "priority")
    assert "order of requests" in of(findings, "left to stock")[0].found


def test_another_scheduler_class_is_a_conflict(doctor, model_folder):
    code, findings = doctor(model_folder, "--scheduler-cls", "my.Scheduler")
    assert code == ExitCode.VERDICT
    (conflict,) = problems(findings)
    assert (conflict.subject, conflict.fix) == ("scheduler", "drop --scheduler-cls")
    name = "vllm_radix.RadixScheduler"
    assert doctor(model_folder, "--scheduler-cls", name)[0] == ExitCode.GOOD


def test_what_vllm_refuses_is_told_in_its_words(doctor, model_folder, folder_of):
    code, findings = doctor(model_folder, "--max-model-len", "999999")
    assert code == ExitCode.VERDICT
    (refused,) = problems(findings)
    assert "max_model_len (999999)" in refused.found and "\n" not in refused.found
    code, findings = doctor(folder_of(model_type="no such model"))
    assert code == ExitCode.VERDICT
    assert "no such model" in problems(findings)[0].found


def test_a_cache_that_cannot_be_told_is_a_note(doctor, folder_of):
    code, findings = doctor(folder_of(layers_block_type=["attention", "echo"]))
    assert code == ExitCode.GOOD
    (cache,) = of(findings, "cache")
    assert cache.status is Status.NOTE and "'echo'" in cache.found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/model"], "MODEL: '/no/such/model': no such folder"),
        (["nobody/nothing"], "MODEL: 'nobody/nothing' cannot be looked at: "),
        (["{model}", "--max-nm-seqs", "3"], "unrecognized arguments: --max-nm-seqs 3"),
        (["{model}", "--radix.polcy", "x"], "unknown radix option 'polcy'; options: "),
        (["{model}", "--radix", "--scheduler-cls", "x"], "not allowed with argument"),
        (["--max-num-seqs", "3"], "unrecognized arguments: --max-num-seqs"),
    ],
)
def test_bad_input_is_one_sentence(capsys, model_folder, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *(word.format(model=model_folder) for word in words)])
    assert stop.value.code == ExitCode.INPUT
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("vllm-radix doctor: ") and message in line
    assert said.out == ""


@pytest.mark.parametrize(
    ("allowed", "fix"),
    [("", "VLLM_PLUGINS=radix, or"), ("lora", "VLLM_PLUGINS=lora,radix, or")],
)
def test_plugins_that_leave_radix_out(doctor, monkeypatch, allowed, fix):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    (found,) = installation.plugin()
    assert found.status is Status.PROBLEM and found.fix.startswith(fix)
    monkeypatch.setenv("VLLM_PLUGINS", "lora,radix")
    assert next(installation.plugin()).status is Status.OK
    monkeypatch.setattr(installation, "entry_points", lambda **group: [])
    assert "pip" in next(installation.plugin()).fix


def test_a_vllm_that_is_not_supported_ends_the_examination(doctor, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        "vllm_radix.engine.support.version",
        lambda name: "0.99.0" if name == "vllm" else real(name),
    )
    code, findings = doctor()
    assert code == ExitCode.VERDICT
    (refused,) = problems(findings)
    assert refused.subject == "vLLM" and "0.99.0 is installed" in refused.found
    assert "install another version" in refused.fix
    assert not of(findings, "patch add-flag"), "it would have been applied"


def test_a_vllm_without_what_is_needed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_radix.engine.scheduler", None)
    *_, last = installation.versions()
    assert (
        last.status is Status.PROBLEM and "lacks what radix is built on" in last.found
    )
    monkeypatch.setattr(installation, "_version", lambda name: None)
    *_, last = installation.versions()
    assert (last.found, last.fix) == ("is not installed", "pip install vllm")


def test_patches_that_do_not_fit_or_do_nothing(monkeypatch):
    first, second, third, *_ = plugin.patches()
    fields = {**vars(first), "target": "vllm.engine.arg_utils:EngineArgs.gone"}
    optional = {**vars(third), "target": "vllm.engine.arg_utils:EngineArgs.lost"}
    idle = {**vars(second), "probe": lambda: False}
    made = tuple(Patch(**one) for one in (fields, idle, optional))
    monkeypatch.setattr(plugin, "patches", lambda: made)
    monkeypatch.setattr(plugin, "register", lambda: None)
    gone, without, idle = sorted(
        installation.patches(), key=lambda one: "idle effect".find(one.subject)
    )[:3]
    by_name = {one.subject: one for one in (gone, without, idle)}
    assert by_name["patch add-flag"].status is Status.PROBLEM
    assert "EngineArgs.gone is gone" in by_name["patch add-flag"].found
    assert by_name["patch lazy-hashes"].status is Status.NOTE
    assert "costs time only" in by_name["patch lazy-hashes"].found
    assert "has no effect" in by_name["patch check-config"].found


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("RADIX_POLICY", "fcfs")
    assert [one.found for one in installation.environment()] == ["RADIX_POLICY=fcfs"]
    monkeypatch.setenv("RADIX_WHATEVER", "1")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    found = [(one.status, one.found) for one in installation.environment()]
    assert [status.value for status, _ in found] == ["note", "note", "ok"]
    assert "RADIX_WHATEVER" in found[0][1] and "grouped attention" in found[1][1]
    monkeypatch.setenv("RADIX_POLICY", "sjf")
    (wrong,) = installation.environment()
    assert wrong.status is Status.PROBLEM and "'sjf' is not one of" in wrong.fix


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_the_table_cuts_nothing(columns, capsys, monkeypatch, model_folder):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert main(["doctor", model_folder, "--scheduler-cls", "x.Y"]) == ExitCode.VERDICT
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines()[:-1])) <= columns
    words = {word.strip("│") for word in shown.split()}
    assert {"VLLM_PLUGINS=lora,radix,", "--scheduler-cls", "problem"} <= words
    assert shown.splitlines()[-1].startswith("A server does not start with radix: 2 pr")


def test_the_verdict_names_the_model(capsys, monkeypatch, model_folder):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor", model_folder]) == ExitCode.GOOD
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"A server of {model_folder} starts with radix.")
    assert main(["doctor"]) == ExitCode.GOOD
    assert "Radix can be used here." in capsys.readouterr().out


def test_only_problems_keep_a_server_from_starting():
    assert starts([note("a", "b")]) and not starts([note("a", "b"), problem("a", "b")])


def test_a_wrong_option_in_a_json_or_a_missing_file_is_said(tiny, tmp_path, capsys):
    bad = '{"radix": {"polciy": 1}}'
    assert main(["doctor", tiny, "--additional-config", bad]) == ExitCode.VERDICT
    assert "unknown radix option 'polciy'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["doctor", tiny, "--config", str(tmp_path / "none.yaml")])
    assert stop.value.code == ExitCode.INPUT
    assert "--config: " in capsys.readouterr().err
