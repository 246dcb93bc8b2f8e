"""The patches: the flag ``--radix``, checks, lazy hashes, metrics.

vLLM has no hook for a plugin to add an engine option, none that runs between the
making of the configuration and the loading of the model, none to say that its
prefix cache needs no hashes, none to show metrics of a scheduler where that one is
used, and none to refuse a request for what it says to the scheduler. Each patch wraps
one method and passes everything through; without the flag or the scheduler class they
change nothing.
"""

import argparse
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_radix_patches.patch import Patch, signature_fingerprint, source_fingerprint

_SCHEDULER = "vllm_radix.RadixScheduler"
_TARGET = "vllm.engine.arg_utils:EngineArgs."
_UPSTREAM = "none yet; engine options of general plugins"
SMALLEST_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
_REMOVE_WHEN = "vLLM lets a general plugin declare engine options and check a config"


def _flag_is_known() -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return any("--radix" in action.option_strings for action in parser._actions)


def _config_with_radix(**more: Any) -> Any:
    """Return vLLM's configuration of the smallest model with radix's scheduler."""
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALLEST_MODEL))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            scheduler_cls=_SCHEDULER,
            **more,
        ).create_engine_config()


def _config_is_checked() -> bool:
    try:
        _config_with_radix(additional_config={"radix": {"no such option": 0}})
    except ValueError as error:
        return "no such option" in str(error)
    return False


class _Reader:
    """Stands for radix's scheduler, which reads no hashes."""

    wants_lazy_hashes = True
    hash_block_size = 1


def _hashes_can_wait() -> bool:
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

    hashed = []

    def hasher(request: Any) -> list[bytes]:
        hashed.append(request)
        return []

    request = EngineCoreRequest(
        request_id="probe",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core: Any = SimpleNamespace(
        mm_receiver_cache=None, request_block_hasher=hasher, scheduler=_Reader()
    )
    EngineCore.preprocess_add_request(core, request)
    return not hashed


def _metrics_are_shown() -> bool:
    from vllm.v1.metrics.loggers import StatLoggerManager

    manager = StatLoggerManager(_config_with_radix(), enable_default_loggers=False)
    ours = type(manager.stat_loggers[-1]).__module__
    return ours.startswith("vllm_radix.")


def _hints_are_checked() -> bool:
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    ours = SimpleNamespace(scheduler_cls=_SCHEDULER)
    processor: Any = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=ours))
    params = SamplingParams(extra_args={"radix_no_such_hint": 1})
    try:
        # Unpatched, it is this that is refused: no task is supported.
        InputProcessor._validate_params(processor, params, ())
    except (ValueError, VLLMValidationError) as error:
        return "radix_no_such_hint" in str(error)
    return False


def make_patches(
    add_flag: Callable[[argparse.ArgumentParser], None],
    use_flag: Callable[[Any], None],
    check_config: Callable[[Any], None],
    choose_hasher: Callable[[Any], None],
    show_metrics: Callable[[Any, Any, int], None],
    check_hints: Callable[[Any, Any], None],
) -> tuple[Patch, ...]:
    """Return the patches, given what they are to call.

    Args:
        add_flag: called with the parser after vLLM's own options are added.
        use_flag: called with an ``EngineArgs`` before it makes a configuration.
        check_config: called with each new ``VllmConfig``; may raise.
        choose_hasher: called with an ``EngineCore`` before it makes a request.
        show_metrics: called with each new ``StatLoggerManager``, its configuration
            and the number of API servers.
        check_hints: called with the configuration and the parameters of each request,
            before the engine sees it; may raise.
    """

    def wrap_add(original: Any) -> Any:
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original.__func__(parser)
            add_flag(parser)
            return parser

        return staticmethod(add_cli_args)

    def wrap_create(original: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            use_flag(self)
            vllm_config = original(self, *args, **kwargs)
            check_config(vllm_config)
            return vllm_config

        return create_engine_config

    def wrap_preprocess(original: Any) -> Any:
        def preprocess_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
            choose_hasher(self)
            return original(self, *args, **kwargs)

        return preprocess_add_request

    def wrap_loggers(original: Any) -> Any:
        signature = inspect.signature(original)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            given = signature.bind(self, *args, **kwargs).arguments
            show_metrics(self, given["vllm_config"], given.get("client_count", 1))

        return __init__

    def wrap_validate(original: Any) -> Any:
        def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            check_hints(self.vllm_config, params)
            return original(self, params, *args, **kwargs)

        return _validate_params

    return (
        Patch(
            name="add-flag",
            target=_TARGET + "add_cli_args",
            why="`vllm serve` knows only the engine options listed in EngineArgs",
            upstream=_UPSTREAM,
            remove_when=_REMOVE_WHEN,
            fingerprint="0048f68523a8fb0e",
            fingerprint_of=signature_fingerprint,
            wrap=wrap_add,
            probe=_flag_is_known,
        ),
        Patch(
            name="check-config",
            target=_TARGET + "create_engine_config",
            why="the scheduler class is first called after the weights have loaded",
            upstream=_UPSTREAM,
            remove_when=_REMOVE_WHEN,
            fingerprint="f2967cc24b6b4fb1",
            fingerprint_of=signature_fingerprint,
            wrap=wrap_create,
            probe=_config_is_checked,
        ),
        Patch(
            name="lazy-hashes",
            target="vllm.v1.engine.core:EngineCore.preprocess_add_request",
            why="requests are hashed before the scheduler sees them; radix needs none",
            upstream="vllm-project/vllm issue 55749 is about what hashes cost",
            remove_when="vLLM hashes on demand, or lets a scheduler choose",
            fingerprint="a8b386db3f85cf76",
            fingerprint_of=source_fingerprint,
            wrap=wrap_preprocess,
            probe=_hashes_can_wait,
            required=False,
        ),
        Patch(
            name="metrics",
            target="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
            why="a logger of the entry point vllm.stat_logger_plugins turns statistics "
            "on for every vLLM on the machine, and LLM ignores it",
            upstream="none yet; loggers of statistics that a scheduler brings",
            remove_when="vLLM asks a scheduler's class for loggers",
            fingerprint="4067526b1a763188",
            fingerprint_of=signature_fingerprint,
            wrap=wrap_loggers,
            probe=_metrics_are_shown,
            required=False,
            without="so that there are no metrics of radix's",
        ),
        Patch(
            name="check-hints",
            target="vllm.v1.engine.input_processor:InputProcessor._validate_params",
            why="a request is refused only there with an error for its client; the "
            "scheduler is too late",
            upstream="none yet; checks of vllm_xargs by who reads them",
            remove_when="vLLM asks a plugin whether a request's vllm_xargs are good",
            fingerprint="55ec2f0d6edfe636",
            fingerprint_of=signature_fingerprint,
            wrap=wrap_validate,
            probe=_hints_are_checked,
            required=False,
            without="so that a wrong hint is ignored with a warning",
        ),
    )
