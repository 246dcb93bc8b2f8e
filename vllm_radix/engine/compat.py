"""Every vLLM name that may move between versions, in one place.

The rest of ``engine/`` imports from here, so that a new vLLM is one file to
read. What is relied upon beyond names is in ``tests/engine/test_compat.py``.

Where supported versions differ in what they do, a function at the end says which it
is, by what vLLM's object has, never by its version.
"""

from typing import Any

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    generate_block_hash_extra_keys,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import (
    DiffusionAsyncScheduler,
    DiffusionScheduler,
)
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import (
    FCFSRequestQueue,
    RequestQueue,
    SchedulingPolicy,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    UniformTypeKVCacheSpecs,
    get_mamba_prefill_checkpoint_position,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

try:
    from vllm.v1.core.kv_cache_planning import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )
except ImportError:
    # Until 0.32.
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )

# A child of vLLM's logger: the only one its logging set-up prints.
logger = init_logger("vllm.radix")

__all__ = [
    "AggregateStatLoggerBase",
    "AsyncScheduler",
    "BlockHash",
    "BlockHashWithGroupId",
    "BlockPool",
    "ChunkedLocalAttentionManager",
    "DiffusionAsyncScheduler",
    "DiffusionScheduler",
    "EngineCoreOutputs",
    "FCFSRequestQueue",
    "FullAttentionManager",
    "KVCacheBlock",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVCacheManager",
    "KVCacheSpecRegistry",
    "MLAAttentionSpec",
    "MambaAttentionBackendEnum",
    "MambaManager",
    "ModelConfig",
    "PauseState",
    "Request",
    "RequestQueue",
    "RequestStatus",
    "Scheduler",
    "SchedulerOutput",
    "SchedulerStats",
    "SchedulingPolicy",
    "SingleTypeKVCacheManager",
    "SlidingWindowMLASpec",
    "SlidingWindowManager",
    "UniformTypeKVCacheSpecs",
    "VllmConfig",
    "cached_tokenizer_from_config",
    "defers_prefills",
    "drops_last_block",
    "envs",
    "generate_block_hash_extra_keys",
    "get_kv_cache_config_from_groups",
    "get_kv_cache_groups",
    "get_mamba_prefill_checkpoint_position",
    "logger",
    "make_serve_parser",
    "num_hash_lookahead_tokens",
]


# -- where versions differ -----------------------------------------------------


def num_hash_lookahead_tokens(owner: Any) -> int:
    """Return how many tokens after a block its hash covers, too.

    From 0.33 on those that a draft model's KV at the end of the block depends on. A
    block is then cached once they are known, and no block is dropped for EAGLE.

    Args:
        owner: a scheduler, or a block pool.
    """
    return getattr(owner, "num_hash_lookahead_tokens", 0)


def drops_last_block(coordinator: Any, group: int) -> bool:
    """Return whether a hit gives up its last block, for EAGLE's hidden states.

    Until 0.32 in the groups of a draft model; since then in fewer of them.

    Args:
        coordinator: vLLM's, of all cache groups.
        group: the index of one.
    """
    flagged = coordinator.eagle_group_ids
    return group in getattr(coordinator, "drop_eagle_group_ids", flagged)


def defers_prefills(scheduler: Any, throttle_prefills: bool) -> bool:
    """Return whether vLLM's next step computes no prompts, for the sake of decodes.

    Where it is told to; and from 0.33 on where ``prefill_schedule_interval`` says so
    without data parallelism.

    Args:
        scheduler: vLLM's, before the step.
        throttle_prefills: as of ``schedule``.
    """
    interval = getattr(scheduler, "local_prefill_interval", 1)
    if interval > 1:
        steps = scheduler.num_executed_steps + 1 - scheduler.last_prefill_step
        throttle_prefills = throttle_prefills or steps < interval
    if not throttle_prefills or scheduler.prefill_capacity_bound:
        return False
    return any(not request.is_prefill_chunk for request in scheduler.running)


def make_serve_parser(parser: Any) -> Any:
    """Add the options of ``vllm serve`` to a parser, and return it.

    The function moved in 0.33; the modules are heavy, and loaded on use.

    Args:
        parser: vLLM's ``FlexibleArgumentParser``.
    """
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    return make_arg_parser(parser)
