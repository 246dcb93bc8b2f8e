"""What is relied upon beyond vLLM's names: the methods that are overridden.

A new vLLM that renames or moves a parameter fails here, by name, and not in a
running server.
"""

import inspect

import pytest

from vllm_radix.engine import compat
from vllm_radix.engine.block_pool import RadixBlockPool
from vllm_radix.engine.groups.full_attention import RadixFullAttentionManager
from vllm_radix.engine.hybrid_manager import HybridKVCacheManager
from vllm_radix.engine.hybrid_pool import HybridBlockPool
from vllm_radix.engine.manager import RadixKVCacheManager
from vllm_radix.engine.scheduler import RadixScheduler
from vllm_radix.engine.tree_manager import TreeKVCacheManager
from vllm_radix.engine.tree_pool import TreeBlockPool

PAIRS = [
    (TreeBlockPool, compat.BlockPool),
    (RadixBlockPool, compat.BlockPool),
    (TreeKVCacheManager, compat.KVCacheManager),
    (RadixKVCacheManager, compat.KVCacheManager),
    (HybridBlockPool, compat.BlockPool),
    (HybridKVCacheManager, compat.KVCacheManager),
    (RadixFullAttentionManager, compat.FullAttentionManager),
    (RadixScheduler, compat.Scheduler),
]
OVERRIDES = [
    (ours, theirs, name)
    for ours, theirs in PAIRS
    for name, value in vars(ours).items()
    if inspect.isfunction(value) and hasattr(theirs, name) and not name.startswith("__")
]


def test_there_are_overrides():
    assert {name for *_, name in OVERRIDES} == {
        "cache_full_blocks",
        "cache_partial_block",
        "move_block_hashes",
        "get_new_blocks",
        "touch",
        "free_blocks",
        "unpin_blocks",
        "evict_blocks",
        "reset_prefix_cache",
        "_maybe_evict_cached_block",
        "new_step_starts",
        "get_computed_blocks",
        "allocate_slots",
        "record_prefix_cache_stats",
        "free",
        "pop_blocks_for_free",
        "_has_partial_local_hit",
        "add_local_computed_blocks",
        "schedule",
        "make_stats",
        "add_request",
        "shutdown",
        "_emit_block_removed_events",
        "_mamba_block_aligned_split",
        "_free_request",
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    OVERRIDES,
    ids=[f"{ours.__name__}.{name}" for ours, _, name in OVERRIDES],
)
def test_an_override_takes_what_vllm_passes(ours, theirs, name):
    mine = inspect.signature(getattr(ours, name)).parameters.values()
    original = inspect.signature(getattr(theirs, name)).parameters
    named = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = named[: len(original)]
    assert [p.name for p in known] == list(original)[: len(known)]
    # A newer vLLM passes more; an older one leaves it out.
    assert all(p.default is not p.empty for p in named[len(known) :])
    rest = list(original.values())[len(known) :]
    takes_rest = {p.kind for p in mine} >= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    assert takes_rest or not rest


def test_every_name_of_compat_exists():
    for name in compat.__all__:
        assert getattr(compat, name) is not None
