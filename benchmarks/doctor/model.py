"""Whether a model, with the options of ``vllm serve``, is served by radix.

Nothing is loaded: vLLM makes its configuration, the groups of the cache come from the
model's, and radix's scheduler is made for them as in a server.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from vllm_radix.config import RadixConfig, section_of
from vllm_radix_bench.doctor.finding import (
    Finding,
    Status,
    note,
    ok,
    problem,
    refusal,
)
from vllm_radix_bench.report.cli_types import InputError

_KINDS = {
    "full": "full attention",
    "swa": "sliding windows of {tokens} tokens",
    "chunked": "attention within chunks of {tokens} tokens",
    "mamba": "states",
}
_NUM_BLOCKS = 1024
"""Of the cache that a scheduler is made for; nothing is served."""


def engine_args(
    model: str, options: Sequence[str], refuse: Callable[[str], NoReturn]
) -> Any:
    """Return vLLM's arguments of a server.

    Args:
        model: folder, or name.
        options: of ``vllm serve``.
        refuse: called with what is wrong with them.

    Raises:
        InputError: there is no such model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_radix.engine.compat import make_serve_parser

    load_general_plugins()
    parser = make_serve_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.error = refuse  # type: ignore[method-assign]
    try:
        arguments: argparse.Namespace = parser.parse_args([model, *options])
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise InputError(f"--config: {name}{error.strerror or error}") from error
    arguments.model = model
    try:
        return AsyncEngineArgs.from_cli_args(arguments)
    # Offline, it looks for the model already here.
    except (OSError, ValueError) as error:
        raise InputError(_not_found(model, error)) from error


def examine(args: Any) -> Iterator[Finding]:
    """Yield what is found of a model and its options.

    Raises:
        InputError: there is no such model.
    """
    from vllm_radix.plugin import SCHEDULER, Chosen, enable, is_ours

    chosen = args.scheduler_cls
    if chosen is not None and not is_ours(chosen):
        yield problem(
            "scheduler",
            f"--scheduler-cls is {chosen}, and radix brings its own",
            "drop --scheduler-cls",
        )
    options = chosen.options if isinstance(chosen, Chosen) else {}
    args.scheduler_cls = SCHEDULER
    section = {**(section_of(args.additional_config) or {}), **options}
    try:
        radix = RadixConfig.resolve(section)
    except ValueError as error:
        yield problem("options", str(error), "correct it in --additional-config")
        return
    defaults = RadixConfig().to_dict()
    told = [f"{k}={v}" for k, v in radix.to_dict().items() if v != defaults[k]]
    yield ok("options", ", ".join(told) or "all as they are by default")
    # What radix refuses is asked for below, all of it.
    enable(args, **{**options, "on_unsupported": "stock", "attention": "stock"})
    try:
        config = args.create_engine_config()
    except OSError as error:
        raise InputError(_not_found(args.model, error)) from error
    # Whatever vLLM and transformers say of a configuration.
    except Exception as error:
        yield problem("vLLM's configuration", _said(error), "see `vllm serve --help`")
        return
    yield ok("model", f"{config.model_config.architecture} of {args.model}")
    found = [*_served(config, radix), *_grouped(config, radix)]
    if radix.on_unsupported == "stock":
        found = [
            replace(one, status=Status.NOTE, fix="stock vLLM serves it, as asked")
            if one.status is Status.PROBLEM
            else one
            for one in found
        ]
    yield from found


def _served(config: Any, radix: RadixConfig) -> Iterator[Finding]:
    """Yield how the groups of the cache are served, or why they are not."""
    from vllm_radix.engine.support import config_problem, public_prefix_problem
    from vllm_radix_bench.sim.model_layouts import layout_of_config

    why = config_problem(config)
    if why is not None:
        yield refusal("model", why)
        return
    why = public_prefix_problem(config, radix)
    if why is not None:
        yield refusal("public_prefix", why)
    try:
        layout = layout_of_config(copy.deepcopy(config))
    # A model's own class may ask for what its configuration lacks.
    except Exception as error:
        yield note(
            "cache",
            f"cannot be told from the model's configuration ({_said(error)})",
            "a server says it after weights have loaded",
        )
        return
    kinds = [_KINDS[g.kind].format(tokens=g.tokens) for g in layout.groups]
    told = ", ".join(
        f"{name} ({count} group{'s' * (count > 1)})"
        for name, count in {name: kinds.count(name) for name in kinds}.items()
    )
    yield ok("cache", told)
    try:
        left = _left_to_stock(config, radix, _specs(config, layout))
    except ValueError as error:
        yield refusal("cache", str(error))
        return
    if left:
        yield note("left to stock", "; ".join(left))
    else:
        yield ok("left to stock", "nothing")


def _specs(config: Any, layout: Any) -> list[Any]:
    """Return vLLM's specs of a layout, with what radix asks of them."""
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    text = config.model_config.hf_text_config
    types = {*(getattr(text, "layer_types", None) or ())}
    specs = layout.specs(config.cache_config.block_size)
    for number, spec in enumerate(specs):
        if isinstance(spec, MambaSpec):
            changed = {"mamba_cache_mode": config.cache_config.mamba_cache_mode}
            if "conv" in types:
                changed["mamba_type"] = MambaAttentionBackendEnum.SHORT_CONV
            specs[number] = replace(spec, **changed)
        elif isinstance(spec, FullAttentionSpec) and config.model_config.use_mla:
            specs[number] = _latent(spec)
    return specs


def _latent(spec: Any) -> Any:
    """Return the spec of MLA with the sizes of another."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return MLAAttentionSpec(
        block_size=spec.block_size,
        num_kv_heads=1,
        head_size=2 * spec.head_size,
        dtype=spec.dtype,
    )


def _left_to_stock(
    config: Any, radix: RadixConfig, specs: list[Any]
) -> tuple[str, ...]:
    """Return what radix's scheduler leaves to stock vLLM in a configuration.

    Raises:
        ValueError: it does not serve it; the message is one sentence.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_radix import RadixScheduler
    from vllm_radix.attention.support import grouped_worker
    from vllm_radix.engine.support import feature_problem, layout_problem
    from vllm_radix_bench.sim.engine import adopt_layout, make_kv_cache_config

    config = copy.deepcopy(config)
    cache = make_kv_cache_config(num_blocks=_NUM_BLOCKS, specs=specs)
    if radix.attention == "grouped":
        worker = grouped_worker(config, strict=False)
        config.parallel_config.worker_cls = worker or config.parallel_config.worker_cls
    if config.kv_transfer_config is not None:
        # Its connector would open ports.
        why = layout_problem(cache) or feature_problem(config, cache, radix)
        if why is not None:
            raise ValueError(why)
        return ("hits inside a block (a KV connector, which knows whole blocks)",)
    options = {**radix.to_dict(), "on_unsupported": "error", "record": ""}
    config.additional_config = {**config.additional_config, "radix": options}
    # Neither a tokenizer is loaded nor a port opened.
    config.model_config.skip_tokenizer_init = True
    config.kv_events_config = None
    config.cache_config.num_gpu_blocks = _NUM_BLOCKS
    config.ec_transfer_config = None
    scheduler: RadixScheduler = RadixScheduler(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        **adopt_layout(config, cache),
    )
    return scheduler.left_to_stock


def _grouped(config: Any, radix: RadixConfig) -> Iterator[Finding]:
    """Yield whether grouped attention is served, if it was asked for."""
    if radix.attention != "grouped":
        return
    from vllm_radix.attention.support import grouped_problem

    why = grouped_problem(config)
    if why is not None:
        yield refusal("attention", why.removeprefix("radix option 'attention': "))
    else:
        yield ok("attention", "a prefix that requests share is read once")


def _not_found(model: str, error: BaseException) -> str:
    """Return that there is no such model, in a sentence."""
    if model.startswith(("/", ".")) and not Path(model).is_dir():
        return f"MODEL: {model!r}: no such folder"
    return f"MODEL: {model!r} cannot be looked at: {_said(error)}"


def _said(error: BaseException) -> str:
    """Return the first line of what an error says."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return next(iter(str(error).splitlines()), type(error).__name__)
