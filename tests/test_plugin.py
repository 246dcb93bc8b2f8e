"""The ways in: flag, scheduler class, LLM arguments, enable."""

import copy
import json
import logging
import pickle

import pytest
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_radix
from vllm_radix.engine.support import install_problem
from vllm_radix.plugin import SCHEDULER, register
from vllm_radix_patches.registry import SMALLEST_MODEL


@pytest.fixture(autouse=True)
def registered():
    """The plugin, registered; and again afterwards, whatever a test pretended."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    register()


@pytest.fixture
def parse(model_folder):
    def parsed(*words):
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        known = parser.parse_args(["--model", model_folder, *words])
        made = AsyncEngineArgs.from_cli_args(known)
        made.skip_tokenizer_init = True
        # As `vllm bench` and a server of several processes pass them on.
        return pickle.loads(pickle.dumps(copy.deepcopy(made)))

    return parsed


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--radix"], {}),
        (["--radix.policy", "fcfs"], {"policy": "fcfs"}),
        (["--radix", "--radix.max_overtakes", "3"], {"max_overtakes": 3}),
        (["--radix", '{"max_overtakes": 3}'], {"max_overtakes": 3}),
        (["--radix.policy=fcfs", "--radix.max_overtakes=3"],
         {"policy": "fcfs", "max_overtakes": 3}),
        (["--radix.sub-block", "false"], {"sub_block": False}),
        (["--radix", '{"explain": true}', "--radix", '{"policy": "fcfs"}'],
         {"explain": True, "policy": "fcfs"}),
    ],
)  # fmt: skip
def test_the_flag_turns_it_on(parse, words, options):
    made = parse(*words).create_engine_config()
    assert made.scheduler_config.scheduler_cls == SCHEDULER
    assert made.additional_config == {"radix": options}


def test_without_the_flag_nothing_is_set(parse):
    made = parse()
    assert made.scheduler_cls is None
    assert "radix" not in made.additional_config


def test_other_additional_config_is_kept(parse):
    made = parse("--radix", "--additional-config", '{"other": 1}')
    made = made.create_engine_config()
    assert made.additional_config == {"other": 1, "radix": {}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--radix", "some/model"], "--radix takes nothing or a JSON object"),
        (["--radix.polcy", "x"], "unknown radix option 'polcy'"),
        (["--radix.policy", "x"], "'x' is not one of 'prefix', 'fcfs'"),
        (["--radix.sub_block", "1"], "1 is not one of true, false"),
        (
            ["--radix.min_sub_block_tokens", "0"],
            "is not a whole number of at least 1",
        ),
        (["--radix", "--scheduler-cls", "a.B"], "not allowed with argument"),
        (["--scheduler-cls", "a.B", "--radix"], "not allowed with argument"),
    ],
)
def test_a_bad_flag_is_a_usage_error(parse, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_flag_is_in_the_help():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    text = parser.format_help()
    assert "--radix" in text
    assert "prefix-aware scheduling" in text


def test_enable_takes_engine_args_and_a_dict(model_folder):
    made = vllm_radix.enable(EngineArgs(model=model_folder), policy="fcfs")
    assert (made.scheduler_cls, made.additional_config["radix"]) == (
        SCHEDULER,
        {"policy": "fcfs"},
    )
    arguments = vllm_radix.enable({"model": "m", "additional_config": {"a": 1}})
    assert arguments["additional_config"] == {"a": 1, "radix": {}}
    again = vllm_radix.enable(arguments, max_overtakes=1)
    assert again["additional_config"]["radix"] == {"max_overtakes": 1}


def test_enable_refuses_bad_options_and_another_scheduler():
    with pytest.raises(ValueError, match="unknown radix option 'x'"):
        vllm_radix.enable({}, x=1)
    with pytest.raises(ValueError, match=r"scheduler_cls is 'a\.B'"):
        vllm_radix.enable({"scheduler_cls": "a.B"})


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"radix": "prefix"}, "radix options are a mapping"),
        ("text", "additional_config, which is a str here: pass a dict"),
    ],
)
def test_enable_names_what_is_wrong_with_what_is_there(additional, message):
    with pytest.raises(ValueError, match=message):
        vllm_radix.enable({"additional_config": additional})


def test_options_in_the_environment_travel_to_the_engine(model_folder, monkeypatch):
    monkeypatch.setenv("RADIX_MAX_OVERTAKES", "3")
    monkeypatch.setenv("RADIX_POLICY", "fcfs")
    made = EngineArgs(model=model_folder, skip_tokenizer_init=True)
    config = vllm_radix.enable(made, policy="prefix").create_engine_config()
    expected = {"policy": "prefix", "max_overtakes": 3}
    assert config.additional_config["radix"] == expected


BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("model", "arguments", "kind"),
    [
        (BERT, {}, "an encoder-only model"),
        # vLLM takes this flag, and warns; there is still no KV to cache.
        (BERT, {"enable_prefix_caching": True}, "an encoder-only model"),
        (SMALLEST_MODEL, {"runner": "pooling", "convert": "embed",
                          "pooler_config": PoolerConfig(seq_pooling_type="MEAN")},
         "a pooling model"),
    ],
)  # fmt: skip
def test_models_without_prefix_caching_are_named_and_no_flag(
    tmp_path, model, arguments, kind
):
    (tmp_path / "config.json").write_text(json.dumps(model))
    made = vllm_radix.enable(
        EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, **arguments)
    )
    with pytest.raises(ValueError, match="serves models with attention") as refused:
        made.create_engine_config()
    message = str(refused.value)
    assert f"this is {kind}, of which vLLM caches no prefixes: start" in message
    assert "--no-enable-prefix-caching" not in message


@pytest.mark.parametrize("scheduler_cls", [SCHEDULER, "class"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"additional_config": {"radix": {"x": 1}}}, "unknown radix option 'x'"),
        ({"enable_prefix_caching": False}, "drop --no-enable-prefix-caching"),
    ],
)
def test_bad_configurations_are_refused_before_weights_load(
    model_folder, scheduler_cls, arguments, message
):
    if scheduler_cls == "class":
        scheduler_cls = vllm_radix.RadixScheduler
    engine_args = EngineArgs(
        model=model_folder,
        skip_tokenizer_init=True,
        scheduler_cls=scheduler_cls,
        **arguments,
    )
    with pytest.raises(ValueError, match=message):
        engine_args.create_engine_config()


def test_an_unsupported_vllm_is_left_alone_with_a_warning(registered, caplog):
    registered.setattr("vllm_radix.engine.support.version", lambda name: "0.99")
    registered.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "0.99 is installed" in install_problem()
    assert "cannot be used" in caplog.text
    assert "supports vllm<0.34,>=0.32, and 0.99 is installed" in caplog.text


WORKER = "vllm_radix.attention.cpu_worker.GroupedCPUWorker"


def test_grouped_attention_brings_its_worker(parse):
    made = parse("--radix.attention", "grouped").create_engine_config()
    assert made.parallel_config.worker_cls == WORKER
    stock = parse("--radix").create_engine_config()
    assert stock.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--attention-backend", "FLASHINFER"], "backend FLASHINFER"),
        (
            ["--worker-cls", "some.Worker"],
            "worker class some.Worker: drop --worker-cls",
        ),
    ],
)
def test_grouped_attention_refuses_by_name_or_leaves_it_to_stock(parse, words, named):
    with pytest.raises(ValueError, match=named) as refused:
        parse("--radix.attention=grouped", *words).create_engine_config()
    assert 'attention="stock"' in str(refused.value)
    allowed = "--radix.on_unsupported=stock"
    made = parse("--radix.attention=grouped", allowed, *words).create_engine_config()
    assert made.parallel_config.worker_cls != WORKER


def test_grouped_attention_refuses_what_its_graphs_and_sums_cannot_give(
    parse, monkeypatch
):
    from vllm.config import CUDAGraphMode

    from vllm_radix.attention.support import grouped_problem

    made = parse("--radix").create_engine_config()
    assert grouped_problem(made) is None
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY):
        made.compilation_config.cudagraph_mode = mode
        assert "PIECEWISE" in grouped_problem(made)
    for mode in ("NONE", "PIECEWISE", "FULL_AND_PIECEWISE"):
        made.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
        assert grouped_problem(made) is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "unset VLLM_BATCH_INVARIANT" in grouped_problem(made)
