"""The patches: the flag ``--radix``, and a check before weights load.

vLLM has no hook for a plugin to add an engine option, nor one that runs between
the making of the configuration and the loading of the model. All three wrap a
method of ``EngineArgs`` and pass everything through; without the flag or the
scheduler class they change nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_radix_patches.record import Patch, signature_fingerprint, source_fingerprint

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


@contextmanager
def _smallest_model() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALLEST_MODEL))
        yield folder


def _flag_takes_effect() -> bool:
    from vllm.engine.arg_utils import EngineArgs

    with _smallest_model() as model:
        arguments = argparse.Namespace(model=model, radix={})
        return EngineArgs.from_cli_args(arguments).scheduler_cls is not None


def _config_is_checked() -> bool:
    from vllm.engine.arg_utils import EngineArgs

    with _smallest_model() as model:
        engine_args = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            scheduler_cls="vllm_radix.RadixScheduler",
            additional_config={"radix": {"no such option": 0}},
        )
        try:
            engine_args.create_engine_config()
        except ValueError as error:
            return "no such option" in str(error)
    return False


def make_patches(
    add_flag: Callable[[argparse.ArgumentParser], None],
    use_flag: Callable[[Any, Any], None],
    check_config: Callable[[Any], None],
) -> tuple[Patch, ...]:
    """Return the patches, given what they are to call.

    Args:
        add_flag: called with the parser after vLLM's own options are added.
        use_flag: called with the new ``EngineArgs`` and the value of the flag,
            when it was given.
        check_config: called with each new ``VllmConfig``; may raise.
    """

    def wrap_add(original: Any) -> Any:
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original.__func__(parser)
            add_flag(parser)
            return parser

        return staticmethod(add_cli_args)

    def wrap_from(original: Any) -> Any:
        def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
            engine_args = original.__func__(cls, args)
            value = getattr(args, "radix", None)
            if value is not None:
                use_flag(engine_args, value)
            return engine_args

        return classmethod(from_cli_args)

    def wrap_create(original: Any) -> Any:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            check_config(vllm_config)
            return vllm_config

        return create_engine_config

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
            name="use-flag",
            target=_TARGET + "from_cli_args",
            why="only declared fields are copied from the parsed arguments",
            upstream=_UPSTREAM,
            remove_when=_REMOVE_WHEN,
            fingerprint="51a013f61829ac5c",
            fingerprint_of=source_fingerprint,
            wrap=wrap_from,
            probe=_flag_takes_effect,
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
    )
