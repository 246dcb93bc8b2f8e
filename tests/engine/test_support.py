"""What is refused, in one sentence that names the fix, and what stock gets."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

import vllm_radix
from support.engine_double import make_kv_cache_config, make_vllm_config
from vllm_radix import RadixScheduler
from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import MambaAttentionBackendEnum
from vllm_radix.engine.support import (
    config_problem,
    feature_problem,
    layout_problem,
    stock_scheduler_cls,
    version_problem,
)

SHAPE = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)
CHUNKS = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)
STATES = MambaSpec(
    block_size=32,
    shapes=((8, 8),),
    dtypes=(torch.float32,),
    mamba_cache_mode="align",
)
STATES_NOT_CACHED = replace(STATES, mamba_cache_mode="none")
REFERENCE = RSWASpec(**SHAPE, rswa_window=64)
CROSS = CrossAttentionSpec(**SHAPE)
SINK = SinkFullAttentionSpec(**SHAPE, sink_len=4)
OPTIONS = RadixConfig()
FIX = 'start without radix, or with the option on_unsupported="stock".'


def change(config, changed):
    """Set parts of a configuration, named as ``section__field``."""
    for name, value in changed.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


def make(specs, asynchronous=False, changed=None, **radix):
    config = change(make_vllm_config(radix=radix), changed or {})
    config.scheduler_config.async_scheduling = asynchronous
    return RadixScheduler(
        vllm_config=config,
        kv_cache_config=make_kv_cache_config(specs=specs),
        structured_output_manager=StructuredOutputManager(config),
        block_size=32,
    )


def test_one_full_attention_group_is_supported():
    assert layout_problem(make_kv_cache_config(specs=[FULL])) is None
    mla = MLAAttentionSpec(**SHAPE)
    assert layout_problem(make_kv_cache_config(specs=[mla])) is None


@pytest.mark.parametrize(
    "specs",
    [
        [WINDOW],
        [FULL, FULL],
        [FULL, WINDOW],
        [WINDOW, FULL, CHUNKS, WINDOW],
        [FULL, STATES],
        [FULL, replace(STATES, mamba_type=MambaAttentionBackendEnum.GDN_ATTN)],
    ],
)
def test_layouts_of_several_groups_are_supported(specs):
    layout = make_kv_cache_config(specs=specs)
    assert layout_problem(layout) is None
    assert feature_problem(make_vllm_config(), layout, OPTIONS) is None


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ([REFERENCE], "RSWASpec x 1 layers"),
        ([FULL, CROSS, WINDOW], "has CrossAttentionSpec x 1 layers:"),
        ([FULL, SINK], "has SinkFullAttentionSpec x 1 layers:"),
        ([REFERENCE, CROSS], "RSWASpec x 1 layers, CrossAttentionSpec x 1 layers"),
        ([FULL, STATES_NOT_CACHED], "mode is not align"),
        ([FULL, replace(STATES, mamba_cache_mode="all")], "mode is not align"),
        (
            [FULL, replace(STATES, mamba_type=MambaAttentionBackendEnum.SHORT_CONV)],
            "short convolutions, whose outputs depend on where prompts are cut",
        ),
        ([], "which has no cache at all"),
    ],
)
def test_other_layouts_are_refused_by_name_with_the_fix(specs, named):
    groups = [KVCacheGroupSpec(["layer"], spec) for spec in specs]
    layout = KVCacheConfig(num_blocks=16, kv_cache_tensors=[], kv_cache_groups=groups)
    problem = layout_problem(layout)
    assert named in problem
    assert problem.endswith(FIX)
    assert problem.count(".") == 1, "one sentence"


def test_a_scheduler_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="which has RSWASpec x 1 layers"):
        make([FULL, REFERENCE])


def drafts(own_kv, method="draft_model"):
    return SimpleNamespace(uses_draft_kv_cache=lambda: own_kv, method=method)


@pytest.mark.parametrize(
    ("specs", "changed", "reason"),
    [
        ([FULL, WINDOW], {"kv_transfer_config": object()}, "a KV connector"),
        (
            [FULL, WINDOW],
            {"speculative_config": drafts(own_kv=True)},
            "drafts of the method 'draft_model', which keep KV",
        ),
        (
            [FULL, STATES],
            {"speculative_config": drafts(own_kv=True)},
            "drafts of the method 'draft_model', which keep KV",
        ),
        (
            [WINDOW],
            {"parallel_config__decode_context_parallel_size": 2},
            "decode context parallelism",
        ),
        (
            [FULL, FULL],
            {"parallel_config__prefill_context_parallel_size": 2},
            "prefill context parallelism",
        ),
        ([FULL, STATES], {"cache_config__use_replayssm": True}, "--use-replayssm"),
        (
            [FULL, CHUNKS],
            {"parallel_config__worker_cls": "vllm_radix.attention.gpu_worker.X"},
            "grouped attention (--radix.attention)",
        ),
    ],
)
def test_a_feature_that_several_groups_lack_is_named_with_the_fix(
    specs, changed, reason
):
    config = change(make_vllm_config(), changed)
    problem = feature_problem(config, make_kv_cache_config(specs=specs), OPTIONS)
    assert problem == (
        "radix serves models with several kinds of cached layers without "
        f"{reason}: leave it out, {FIX}"
    )
    # One group of full attention has it.
    assert feature_problem(config, make_kv_cache_config(specs=[FULL]), OPTIONS) is None


@pytest.mark.parametrize("other", [WINDOW, CHUNKS, STATES])
def test_drafts_without_kv_of_their_own_are_served(other):
    config = change(make_vllm_config(), {"speculative_config": drafts(own_kv=False)})
    layout = make_kv_cache_config(specs=[FULL, other])
    assert feature_problem(config, layout, OPTIONS) is None


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("specs", "changed"),
    [
        ([FULL, STATES_NOT_CACHED], {}),
        ([FULL, WINDOW], {"parallel_config__prefill_context_parallel_size": 2}),
    ],
)
def test_stock_serves_them_when_asked_and_the_log_says_so(
    specs, changed, asynchronous, caplog, monkeypatch
):
    made = []
    for stock in (Scheduler, AsyncScheduler):
        # Some of what is refused needs more of vLLM than a test has.
        monkeypatch.setattr(stock, "__init__", lambda self, *a, **kw: made.append(self))
    logger = __import__("logging").getLogger("vllm")
    logger.propagate = True
    try:
        make(specs, asynchronous, changed, on_unsupported="stock")
    finally:
        logger.propagate = False
    assert [type(one) for one in made] == [
        AsyncScheduler if asynchronous else Scheduler
    ]
    assert "Serving with stock vLLM, as asked" in caplog.text


@pytest.mark.parametrize("diffusion", [None, object()])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_stock_is_the_class_that_vllm_would_choose(diffusion, asynchronous):
    config = SimpleNamespace(
        diffusion_config=diffusion,
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
    )
    name = stock_scheduler_cls(config).__name__
    assert ("Diffusion" in name, "Async" in name) == (bool(diffusion), asynchronous)


def test_an_instance_of_a_multi_modal_encoder_alone_is_named():
    config = make_vllm_config()
    config.model_config.multimodal_config = SimpleNamespace(mm_encoder_only=True)
    # As vLLM does for it, whatever flags are given.
    config.cache_config.enable_prefix_caching = False
    assert "this is a multi-modal encoder alone" in config_problem(config)


def test_the_installed_vllm_is_supported():
    assert version_problem() is None


def test_the_start_is_announced_in_one_line(caplog):
    logger = __import__("logging").getLogger("vllm")
    logger.propagate = True
    try:
        make([FULL], max_overtakes=3)
    finally:
        logger.propagate = False
    # pytest listens to the logger and to its root: each record comes twice.
    (line,) = {r.message for r in caplog.records if "vllm-radix" in r.message}
    on = f"on vLLM {vllm_radix.vllm_version()}:"
    for part in (on, "RadixKVCacheManager", "policy=prefix", "overtakes=3"):
        assert part in line
    assert "left to stock vLLM: nothing" in line
