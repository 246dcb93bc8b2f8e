"""vLLM's real scheduler without a model: what `replay` and the tests run on.

The scheduler, its KV cache manager and its requests are vLLM's own (or ours);
only the worker is missing. Whoever drives it makes up the tokens.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_radix.engine.lazy_hashes import LazyHasher
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_patches.registry import SMALLEST_MODEL

VOCABULARY = 50


@cache
def _model_folder(max_model_len: int) -> "TemporaryDirectory[str]":
    folder = TemporaryDirectory()
    model = {
        **SMALLEST_MODEL,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max_model_len,
    }
    (Path(folder.name) / "config.json").write_text(json.dumps(model))
    return folder


def make_vllm_config(
    block_size: int = 32,
    num_blocks: int = 16,
    radix: dict[str, Any] | None = None,
    max_model_len: int = 4096,
    **engine_args: Any,
) -> Any:
    """Return a configuration; ``num_blocks`` counts the null block.

    Args:
        block_size: tokens in a block.
        num_blocks: blocks of the pool.
        radix: options of radix.
        max_model_len: longest request, in tokens.
        engine_args: more of vLLM's.
    """
    config = EngineArgs(
        model=_model_folder(max_model_len).name,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        block_size=block_size,
        max_model_len=max_model_len,
        additional_config={"radix": radix or {}},
        **engine_args,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    return config


def make_kv_cache_config(
    block_size: int = 32, num_blocks: int = 16, specs: Sequence[Any] | None = None
) -> KVCacheConfig:
    """Return the layout of one full-attention group, or of the given specs."""
    full = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    groups = [
        KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs or [full])
    ]
    return KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups
    )


def make_scheduler(
    cls: Callable[..., Any],
    block_size: int = 32,
    num_blocks: int = 16,
    asynchronous: bool = False,
    layout: Layout | Sequence[KVCacheSpec] | None = None,
    **options: Any,
) -> Any:
    """Return a scheduler without an engine.

    Args:
        cls: its class, vLLM's or ours.
        block_size: tokens in a block, where the layout names no number.
        num_blocks: blocks of the pool, with the null block.
        asynchronous: whether steps are scheduled ahead of their results.
        layout: groups of the cache, or vLLM's specs of them, whatever their blocks;
            None is one of full attention.
        options: ``radix``, and others of ``make_vllm_config``.

    Raises:
        ValueError: the scheduler, or vLLM, does not serve the layout.
    """
    config = make_vllm_config(block_size, num_blocks, **options)
    # The CPU platform turns it off; the scheduler does not mind.
    config.scheduler_config.async_scheduling = asynchronous
    kv_cache_config = make_kv_cache_config(block_size, num_blocks)
    sizes = {"block_size": block_size}
    if layout is not None:
        specs = layout
        if isinstance(layout, Layout):
            specs = layout.at(block_size).specs(block_size)
        kv_cache_config = make_kv_cache_config(num_blocks=num_blocks, specs=specs)
        sizes = adopt_layout(config, kv_cache_config)
    return cls(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        log_stats=True,
        **sizes,
    )


def adopt_layout(config: Any, kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Give two configurations what vLLM's engine core gives them for a layout.

    Returns:
        The scheduler's block sizes, by the names of its arguments.
    """
    cache = config.cache_config
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    cache.block_size = min(spec.block_size for spec in specs)
    states = [spec.block_size for spec in specs if isinstance(spec, MambaSpec)]
    if states:
        # A hybrid model's configuration says so by itself; its blocks are all equal.
        cache.block_size = max(states)
        cache.mamba_cache_mode = "align"
        cache.mamba_block_size = cache.block_size
    kv_cache_config.prefix_cache_retention_interval = (
        cache.prefix_cache_retention_interval
    )
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
    kv_cache_config.hash_block_size = hash_block_size
    return {"block_size": block_size, "hash_block_size": hash_block_size}


def blocks_for(
    layout: Layout, block_size: int, longest: int, tokens_in_a_step: int
) -> int:
    """Return the blocks without which vLLM would not start.

    Args:
        layout: of the cache.
        block_size: tokens in a block, where the layout names no number.
        longest: request, in tokens.
        tokens_in_a_step: at most.
    """
    config = make_vllm_config(
        block_size, max_model_len=longest, max_num_batched_tokens=tokens_in_a_step
    )
    specs = layout.at(block_size).specs(block_size)
    adopt_layout(config, make_kv_cache_config(specs=specs))
    return sum(
        cdiv(spec.max_memory_usage_bytes(config), spec.page_size_bytes)
        for spec in specs
    )


class RequestMaker:
    """Makes vLLM's requests for a scheduler, hashed as its engine would.

    Args:
        scheduler: that they are for.

    Attributes:
        hashed: block hashes computed so far.
    """

    def __init__(self, scheduler: Any) -> None:
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        block_size = scheduler.hash_block_size
        hasher = get_request_block_hasher(block_size, hash_fn)
        self.hashed = 0

        def counted(request: Request) -> Any:
            hashes = hasher(request)
            self.hashed += len(hashes)
            return hashes

        self._hasher: Any = None
        if scheduler.kv_cache_manager.enable_caching:
            self._hasher = counted
        if getattr(scheduler, "wants_lazy_hashes", False):
            self._hasher = LazyHasher(counted, block_size)

    def make(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        prompt_logprobs: int | None = None,
        extra_args: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Request:
        """Return a request that generates exactly ``max_tokens``.

        Args:
            request_id: of the request.
            prompt: its tokens.
            max_tokens: to generate.
            prompt_logprobs: as of ``SamplingParams``.
            extra_args: as of ``SamplingParams``.
            fields: others of vLLM's ``Request``.
        """
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=0,
            prompt_logprobs=prompt_logprobs,
            extra_args=extra_args,
        )
        sampling.update_from_generation_config({}, 2)
        return Request(
            request_id,
            list(prompt),
            sampling,
            None,
            block_hasher=self._hasher,
            **fields,
        )
