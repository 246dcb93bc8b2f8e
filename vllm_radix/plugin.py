"""What vLLM loads: the flag ``--radix``, and ``enable`` for Python.

Kept light, because vLLM swallows an import error here and goes on without the
plugin. Registering changes nothing until radix is asked for.
"""

import argparse
import json
from typing import Any, TypeVar

from vllm_radix.config import (
    SECTION,
    RadixConfig,
    flag_value,
    from_environment,
    section_of,
)

SCHEDULER = "vllm_radix.RadixScheduler"

ArgsT = TypeVar("ArgsT", bound=Any)


def register() -> None:
    """Register with vLLM; called in each of its processes, any number of times.

    On a vLLM that this version does not know, it warns and leaves vLLM as it
    is: asking for radix then fails with the same sentence.
    """
    from vllm_radix.engine.support import remember_problem, version_problem

    problem = version_problem()
    if problem is None:
        from vllm_radix_patches.patch import PatchError, apply_all

        try:
            apply_all(patches())
        except PatchError as error:
            problem = str(error)
        else:
            from vllm_radix.metrics.wire import declare

            declare()
    remember_problem(problem)
    if problem is not None:
        from vllm_radix.engine.compat import logger

        logger.warning("vllm-radix is installed but cannot be used: %s", problem)


def patches() -> tuple[Any, ...]:
    """Return the patches to vLLM, in order of application."""
    from vllm_radix_patches.registry import make_patches

    return make_patches(
        _add_flag,
        _use_flag,
        _check_config,
        _choose_hasher,
        _show_metrics,
        _check_hints,
    )


def enable(engine_args: ArgsT, **options: Any) -> ArgsT:
    """Turn radix on, for an ``EngineArgs`` or for keyword arguments of ``LLM``.

    Args:
        engine_args: changed and returned. A dict is taken for the keyword
            arguments of ``LLM``: ``LLM(**enable({"model": ...}))``.
        options: see ``vllm_radix.config.RadixConfig``.

    Raises:
        ValueError: an option is wrong, or another scheduler class is set.
    """
    # One view of both kinds; an EngineArgs keeps its fields in its __dict__.
    fields = engine_args if isinstance(engine_args, dict) else vars(engine_args)
    present = fields.get("scheduler_cls")
    if present is not None and not is_ours(present):
        raise ValueError(
            f"radix brings its own scheduler, and scheduler_cls is {present!r}: "
            "drop one of the two"
        )
    additional = fields.get("additional_config")
    section = section_of(additional) or {}
    RadixConfig.resolve(section)
    additional = {**(additional or {}), SECTION: {**section, **options}}
    RadixConfig.resolve(additional[SECTION])
    fields["scheduler_cls"] = SCHEDULER
    fields["additional_config"] = additional
    return engine_args


def is_ours(scheduler_cls: object) -> bool:
    """Whether a scheduler class, or its name, is radix's or derives from it."""
    if isinstance(scheduler_cls, type):
        names = [f"{c.__module__}.{c.__qualname__}" for c in scheduler_cls.__mro__]
    else:
        names = [str(scheduler_cls)]
    return any(
        name.startswith("vllm_radix.") and name.endswith("RadixScheduler")
        for name in names
    )


class Chosen(str):
    """The name of radix's scheduler class, carrying the options of ``--radix``.

    vLLM copies declared fields from the command line to its ``EngineArgs``, so
    what the flag says travels in the field it stands for.
    """

    options: dict[str, Any]

    def __new__(cls, options: dict[str, Any]) -> "Chosen":
        """Return the name, with options."""
        chosen = super().__new__(cls, SCHEDULER)
        chosen.options = options
        return chosen

    def __reduce__(self) -> Any:
        """Keep the options when vLLM copies or sends its arguments."""
        return Chosen, (self.options,)


class _RadixFlag(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Choose radix's scheduler class."""
        given = getattr(namespace, "scheduler_cls", None)
        before = given.options if isinstance(given, Chosen) else {}
        namespace.scheduler_cls = Chosen({**before, **values})


def _add_flag(parser: argparse.ArgumentParser) -> None:
    defaults = json.dumps(RadixConfig().to_dict()).replace("%", "%%")
    group = parser.add_argument_group(
        title="Radix",
        description="Radix-tree KV cache and prefix-aware scheduling (vllm-radix).",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--radix",
        action=_RadixFlag,
        nargs="?",
        const={},
        default=argparse.SUPPRESS,
        type=flag_value,
        metavar="JSON",
        help="Turn on the radix-tree KV cache and prefix-aware scheduling. Options "
        "as a JSON object or one by one, as in --radix.policy prefix. Defaults: "
        f"{defaults}.",
    )
    # Both set the same field; the last one would win without a word.
    other = parser._option_string_actions.get("--scheduler-cls")
    if other is not None:
        either._group_actions.append(other)


def _use_flag(engine_args: Any) -> None:
    """Turn radix on where the flag chose it."""
    chosen = engine_args.scheduler_cls
    if isinstance(chosen, Chosen):
        enable(engine_args, **chosen.options)


def _choose_hasher(engine_core: Any) -> None:
    """Let an engine's block hashes wait where nobody may ever read them."""
    hasher = engine_core.request_block_hasher
    scheduler = engine_core.scheduler
    if hasher is None or not getattr(scheduler, "wants_lazy_hashes", False):
        return
    from vllm_radix.engine.compat import num_hash_lookahead_tokens
    from vllm_radix.engine.lazy_hashes import LazyHasher

    if not isinstance(hasher, LazyHasher):
        engine_core.request_block_hasher = LazyHasher(
            hasher, scheduler.hash_block_size, num_hash_lookahead_tokens(scheduler)
        )


def _show_metrics(manager: Any, vllm_config: Any, client_count: int) -> None:
    """Add radix's metrics to vLLM's loggers of statistics, where radix serves."""
    if not is_ours(vllm_config.scheduler_config.scheduler_cls):
        return
    from vllm_radix.metrics.collector import RadixStatLogger

    # As vLLM's: with several API servers a line would tell of a part.
    says = client_count == 1
    logger = RadixStatLogger(vllm_config, manager.engine_indexes, says)
    manager.stat_loggers.append(logger)


def _check_hints(vllm_config: Any, params: Any) -> None:
    """Refuse a request whose hints are wrong, before the engine sees it."""
    extra_args = getattr(params, "extra_args", None)
    if not extra_args or not is_ours(vllm_config.scheduler_config.scheduler_cls):
        return
    from vllm.exceptions import VLLMValidationError

    from vllm_radix.engine.hints import HintError, parse_hints

    try:
        parse_hints(extra_args)
    except HintError as error:
        raise VLLMValidationError(str(error), parameter=error.field) from error


def _check_config(vllm_config: Any) -> None:
    """Refuse what cannot be served, before weights load."""
    if not is_ours(vllm_config.scheduler_config.scheduler_cls):
        return
    from vllm_radix.engine.support import early_problem

    present = vllm_config.additional_config
    config = RadixConfig.from_additional_config(present)
    problem = early_problem(vllm_config, config)
    if problem is not None and config.on_unsupported == "error":
        raise ValueError(problem)
    if problem is None and config.attention == "grouped":
        from vllm_radix.attention.support import grouped_worker

        worker = grouped_worker(vllm_config, strict=config.on_unsupported == "error")
        if worker is not None:
            vllm_config.parallel_config.worker_cls = worker
    environment = from_environment()
    if environment:
        # Engine processes may have another environment than this one.
        section = {**environment, **(section_of(present) or {})}
        vllm_config.additional_config = {**(present or {}), SECTION: section}
