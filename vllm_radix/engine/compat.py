"""Every vLLM name that may move between versions, in one place.

The rest of ``engine/`` imports from here, so that a new vLLM is one file to
read. What is relied upon beyond names is in ``tests/engine/test_compat.py``.
"""

from vllm import envs
from vllm.config import VllmConfig
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
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

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
    "envs",
    "generate_block_hash_extra_keys",
    "logger",
]
