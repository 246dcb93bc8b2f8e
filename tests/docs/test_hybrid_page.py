"""What the page on hybrid models says of them is so."""

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    SlidingWindowSpec,
)

from support.pages import ROOT
from vllm_radix.engine.support import layout_problem
from vllm_radix_bench.sim.engine import make_vllm_config

PAGE = (ROOT / "docs" / "hybrid-models.md").read_text()
SIZES = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


@pytest.fixture
def layout():
    def make(**flags):
        """The cache layout of a model with a full and a windowed layer."""
        specs = {
            "layer0": FullAttentionSpec(**SIZES),
            "layer1": SlidingWindowSpec(**SIZES, sliding_window=128),
        }
        config = make_vllm_config(**flags)
        config.cache_config.kv_cache_layout = "LBNHC"  # an engine would resolve it
        groups = get_kv_cache_groups(config, specs)
        return KVCacheConfig(16, kv_cache_tensors=[], kv_cache_groups=groups)

    return make


def test_windows_beside_full_attention_are_refused_with_the_sentence_shown(layout):
    sentence = layout_problem(layout(disable_hybrid_kv_cache_manager=False))
    assert sentence in " ".join(PAGE.split())


def test_the_flag_it_names_gives_a_layout_that_is_served(layout):
    assert layout_problem(layout(disable_hybrid_kv_cache_manager=True)) is None
    assert "--disable-hybrid-kv-cache-manager" in PAGE
