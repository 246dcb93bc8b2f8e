"""The options of ``vllm serve`` and ``vllm bench serve``, checked at once."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vllm_radix.config import RadixConfig
from vllm_radix_bench.ab.servers import ServerSpec, radix_words
from vllm_radix_bench.report.cli_types import InputError

_OURS = {
    "port": "ab chooses a free port for each server",
    "host": "ab serves on this machine only",
    "uds": "ab talks to its servers by TCP",
    "ssl_keyfile": "ab talks to its servers without TLS",
    "ssl_certfile": "ab talks to its servers without TLS",
    "headless": "ab needs an API server",
    "grpc": "ab talks to its servers by HTTP",
    "scheduler_cls": "ab chooses the scheduler of each arm; --radix has the options "
    "of radix",
    "disable_log_stats": "ab reads counts from /metrics",
    "config": "write its options out, so that the report has them",
}
"""Options of ``vllm serve`` that an A/B sets or cannot do without, and why."""

_BENCH_OURS = {
    "base_url": "ab knows its servers",
    "host": "ab knows its servers",
    "port": "ab knows its servers",
    "model": "it is that of the servers",
    "save_result": "results are in --output",
    "result_dir": "results are in --output",
    "result_filename": "results are in --output",
    "append_result": "results are in --output",
    "tokenizer": "it is that of the servers",
    "served_model_name": "it is that of the servers",
}

_SECRET = ("--api-key", "--hf-token")
"""Options whose values no report shows."""


@dataclass(frozen=True)
class ServeOptions:
    """What ``vllm serve`` is told, checked.

    Attributes:
        model: folder or name.
        words: options for both arms, without those of radix.
        radix: options of radix.
        tokenizer: folder or name.
        api_key: that servers ask for; None for none.
        orders_by_priority: whether the scheduler orders by priority.
        tenant_field: of ``vllm_xargs`` that names tenants.
        rounds_coarsely: whether weights or cache are of fewer bits than the model's
            type, so that nobody knows how far rounding moves an answer.
        trusts_code: whether code of the model's authors may run.
        memory_share: of the machine that a server takes for itself; None where the size
            of the cache is given.
    """

    model: str
    words: tuple[str, ...]
    radix: dict[str, Any]
    tokenizer: str
    api_key: str | None = None
    orders_by_priority: bool = False
    tenant_field: str = "tenant"
    rounds_coarsely: bool = False
    trusts_code: bool = False
    memory_share: float | None = None

    def spec(self, arm: str, extra: Sequence[str] = ()) -> ServerSpec:
        """Return how an arm's server is started.

        Args:
            arm: ``stock`` or ``radix``.
            extra: more words, for both arms.
        """
        words = (*self.words, *extra)
        if arm == "radix":
            words += radix_words(self.radix)
        return ServerSpec(arm, self.model, words, self.api_key)


def split_radix(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of ``vllm serve`` without, and those with, radix's options."""
    others: list[str] = []
    ours: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name != "--radix" and not name.startswith("--radix."):
            others.append(word)
            continue
        ours.append(word)
        # The flag alone needs no value; an option does.
        takes = rest and not rest[0].startswith("--")
        if name == "--radix":
            takes = takes and rest[0].lstrip().startswith("{")
        if takes and not equals:
            ours.append(rest.pop(0))
    return others, ours


def shown(words: Sequence[str]) -> list[str]:
    """Return options for a report: without keys and tokens."""
    out: list[str] = []
    is_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            is_secret = name.replace("_", "-") in _SECRET
            out.append(f"{name}=***" if is_secret and equals else word)
        else:
            out.append("***" if is_secret else word)
    return out


def without_model(words: Sequence[str], parse: Callable[[list[str]], Any]) -> list[str]:
    """Return the words without the one that is the model.

    An option may have the same value: what still parses, and has no model, is right.
    """
    model = parse(list(words)).model_tag
    for at, word in enumerate(words):
        if word == model:
            rest = [*words[:at], *words[at + 1 :]]
            try:
                if parse(rest).model_tag is None:
                    return rest
            except InputError:
                continue
    return list(words)


def _parse(
    add: Callable[[Any], Any], words: Sequence[str], command: str
) -> tuple[Any, set[str]]:
    """Return what vLLM's parser makes of words, and the names of options given.

    Raises:
        InputError: it refuses them.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{command}: {message}")

    parser = Parser(prog=command)
    add(parser)
    arguments = parser.parse_args(list(words))
    given = set()
    for action in parser._actions:
        # Abbreviated, an option is not among the words.
        is_ours = action.dest in _OURS or action.dest in _BENCH_OURS
        if is_ours and getattr(arguments, action.dest) != action.default:
            given.add(action.dest)
        for option in action.option_strings:
            base = option.replace("_", "-")
            if any(
                word.replace("_", "-").split("=")[0].split(".")[0] == base
                for word in words
                if word.startswith("-")
            ):
                given.add(action.dest)
    return arguments, given


def _not_ours(name: str) -> InputError:
    return InputError(f"--{name.replace('_', '-')}: leave it away: {_OURS[name]}")


def read_serve(words: Sequence[str]) -> ServeOptions:
    """Return what the words after ``vllm-radix ab`` tell ``vllm serve``.

    Raises:
        InputError: an option is wrong, or ab's to choose; or no model is named.
    """
    from vllm_radix.engine.compat import make_serve_parser
    from vllm_radix_bench.ab.offline import models

    others, ours = split_radix(words)
    radix = _radix_options(ours)
    if any(word.split("=")[0] == "--config" for word in others):
        raise _not_ours("config")  # vLLM's parser would open the file
    arguments, given = _parse(make_serve_parser, others, "vllm serve")
    for name in _OURS:
        if name in given:
            raise _not_ours(name)
    model = arguments.model_tag or ("model" in given and arguments.model)
    if not model:
        raise InputError(
            "name a model, as in `vllm-radix ab MODEL`: a folder or a name on the "
            "Hugging Face hub; or run the engines in this process with --offline"
        )
    models.find(model, "the model")
    if arguments.model_tag is not None:
        others = without_model(
            others, lambda words: _parse(make_serve_parser, words, "vllm serve")[0]
        )
    key = arguments.api_key or os.environ.get("VLLM_API_KEY")
    return ServeOptions(
        model=model,
        words=tuple(others),
        radix=radix,
        tokenizer=arguments.tokenizer or model,
        api_key=key[0] if isinstance(key, list) else key,
        orders_by_priority=str(arguments.scheduling_policy) == "priority",
        tenant_field=radix.get("tenant") or "tenant",
        rounds_coarsely=_rounds_coarsely(arguments),
        trusts_code=bool(arguments.trust_remote_code),
        memory_share=(
            None
            if arguments.kv_cache_memory_bytes or "VLLM_CPU_KVCACHE_SPACE" in os.environ
            else float(arguments.gpu_memory_utilization)
        ),
    )


def _rounds_coarsely(arguments: Any) -> bool:
    kept = str(arguments.kv_cache_dtype)
    return bool(arguments.quantization) or kept not in ("auto", "bfloat16", "float16")


def _radix_options(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of radix that words of ``vllm serve`` give.

    Raises:
        InputError: one is wrong.
    """
    from vllm_radix.plugin import _add_flag

    given, _ = _parse(_add_flag, words, "vllm serve")
    chosen = getattr(given, "scheduler_cls", None)
    options: dict[str, Any] = dict(getattr(chosen, "options", {}))
    try:
        RadixConfig.resolve(options)
    except ValueError as error:
        raise InputError(str(error)) from error
    return options


def check_bench(words: Sequence[str]) -> None:
    """Check the words after ``--``.

    Raises:
        InputError: ``vllm bench serve`` refuses one, or it is ab's to choose.
    """
    from vllm.benchmarks.serve import add_cli_args

    _, given = _parse(add_cli_args, words, "vllm bench serve")
    for name, why in _BENCH_OURS.items():
        if name in given:
            raise InputError(
                f"vllm bench serve: --{name.replace('_', '-')}: leave it away: {why}"
            )
