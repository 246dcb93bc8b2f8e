"""Makes the loads that a command line asks for."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_radix.config import RadixConfig
from vllm_radix.public_prefix import has_texts
from vllm_radix_bench.ab.loads import LOADS, Forest, Load, built_in, in_vocabulary
from vllm_radix_bench.ab.serve_options import ServeOptions
from vllm_radix_bench.ab.servers import Cache
from vllm_radix_bench.replay.cache_keys import CacheKeys
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.encoders import ChatTemplate, load_encode
from vllm_radix_bench.workloads.sizing import REFERENCE_CACHE, build
from vllm_radix_bench.workloads.turn import Turn, Workload, longest_path

_LARGEST_SCALE = 3.0
"""Factor on the builders' lengths: their prompts have then up to some 4,500 tokens."""
_SHRINK = 0.8


def read_trace(arguments: argparse.Namespace, tokenizer: str) -> list[Turn] | None:
    """Return the requests of the trace; None if none is named.

    Raises:
        ValueError: it cannot be read; the message says where.
    """
    if arguments.trace is None:
        return None
    folder = Path(tokenizer)
    return load(
        arguments.trace,
        load_encode(folder),
        encode_chat=ChatTemplate(folder),
        closed_loop=arguments.closed_loop,
        limit=arguments.limit,
        rate=arguments.speed,
    )


def vocabulary_of(model: str, trusts_code: bool) -> int:
    """Return how many tokens a model knows."""
    from vllm.transformers_utils.config import get_config

    config: Any = get_config(model, trust_remote_code=trusts_code)
    return int(config.get_text_config().vocab_size)


def sized(
    name: str,
    tokenizer: str,
    cache: Cache,
    max_model_len: int,
    pressure: float,
    seed: int,
) -> Workload:
    """Return a built-in workload for a cache, with requests that the model takes.

    Raises:
        InputError: the model takes none.
    """
    encode = load_encode(Path(tokenizer))
    blocks = max(1, cache.tokens // cache.block_size)
    scale = min(cache.tokens / REFERENCE_CACHE, _LARGEST_SCALE)
    while scale > 0.02:
        work = build(
            name,
            encode,
            num_blocks=blocks,
            block_size=cache.block_size,
            pressure=pressure,
            seed=seed,
            scale=scale,
        )
        if longest_path(work.roots) < max_model_len:
            return work
        scale *= _SHRINK
    raise InputError(
        f"{name}: a request does not fit the server's {max_model_len:,} tokens: raise "
        "--max-model-len"
    )


def shared_keys(serve: ServeOptions, block_size: int) -> list[CacheKeys]:
    """Return what radix may tell prompts apart by, if salts share a public prefix.

    Models with several cache groups share to the very token, others whole blocks; a
    server does not tell which it has, and the fewest of both is a bound for either.

    Args:
        serve: how servers are started.
        block_size: of their caches.

    Raises:
        InputError: the model has no tokens for what is public.
    """
    config = RadixConfig.resolve(serve.radix)
    if config.public is None:
        return []
    from vllm.config import ModelConfig

    from vllm_radix.engine.public_prefixes import make_public_prefixes

    model = None
    if has_texts(config.public):
        model = ModelConfig(
            model=serve.model,
            tokenizer=serve.tokenizer,
            trust_remote_code=serve.trusts_code,
        )
    try:
        public = make_public_prefixes(config, model)
    except ValueError as error:
        raise InputError(str(error)) from error
    return [CacheKeys(public, size) for size in (1, block_size)]


def make_loads(
    arguments: argparse.Namespace,
    names: Sequence[str],
    trace: list[Turn] | None,
    serve: ServeOptions,
    cache: Cache,
    max_model_len: int,
) -> list[Load]:
    """Return what is sent: the trace, another program's requests, built-in workloads.

    Args:
        arguments: of the command.
        names: of built-in workloads.
        trace: requests of it; None for no trace.
        serve: how servers are started.
        cache: that built-in workloads are sized for.
        max_model_len: tokens of the longest request that the servers take.

    Raises:
        InputError: a request is too long.
    """
    loads: list[Load] = []
    if trace is not None:
        roots = in_vocabulary(trace, vocabulary_of(serve.model, serve.trusts_code))
        if arguments.rate == math.inf or arguments.matrix_rate:
            # Those that have no rate are sent at once, not at the trace's times.
            for root in roots:
                root.arrival = 0.0
        longest = longest_path(roots)
        if longest > max_model_len:
            raise InputError(
                f"--trace: a request takes {longest:,} tokens, and the servers take "
                f"{max_model_len:,}: raise --max-model-len"
            )
        what, keys = "requests of a trace", shared_keys(serve, cache.block_size)
        loads.append(Forest("trace", arguments.trace.name, what, roots, keys=keys))
    if arguments.after:
        log = arguments.output.with_name(
            f"{arguments.output.stem}-{arguments.load}.log"
        )
        made = LOADS[arguments.load](tuple(arguments.after), log, serve.tokenizer)
        loads.append(made)
    for name in names:
        work = sized(
            name,
            serve.tokenizer,
            cache,
            max_model_len,
            arguments.pressure,
            arguments.seed,
        )
        loads.append(built_in(work))
    return loads
