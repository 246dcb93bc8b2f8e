"""What is refused, in one sentence that names the fix, and what stock gets."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

from support.engine_double import make_kv_cache_config, make_vllm_config
from vllm_radix import RadixScheduler
from vllm_radix.engine.support import (
    config_problem,
    layout_problem,
    stock_scheduler_cls,
    version_problem,
)

SHAPE = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)
CHUNKS = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)
STATES = MambaSpec(block_size=32, shapes=((8, 8),), dtypes=(torch.float32,))


def make(specs, asynchronous=False, **radix):
    config = make_vllm_config(radix=radix)
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
    ("specs", "named"),
    [
        ([WINDOW], "SlidingWindowSpec of 64 x 1 layers"),
        ([FULL, WINDOW], "FullAttentionSpec x 1 layers, SlidingWindowSpec of 64"),
        ([FULL, FULL], "FullAttentionSpec x 1 layers, FullAttentionSpec x 1 layers"),
    ],
)
def test_other_layouts_are_refused_by_name_with_the_fix(specs, named):
    with pytest.raises(ValueError, match=named) as refused:
        make(specs)
    assert 'on_unsupported="stock"' in str(refused.value)
    assert str(refused.value).count(".") == 1, "one sentence"


@pytest.mark.parametrize(
    ("specs", "promoted"),
    [
        ([FULL, WINDOW], True),
        ([WINDOW, FULL, CHUNKS, WINDOW], True),
        # Without full attention beside it vLLM's flag changes nothing.
        ([WINDOW], False),
        ([FULL, FULL], False),
        ([FULL, STATES], False),
    ],
)
def test_the_flag_that_helps_is_named_where_it_helps(specs, promoted):
    problem = layout_problem(make_kv_cache_config(specs=specs))
    flag = "start with --disable-hybrid-kv-cache-manager, which makes"
    assert (flag in problem) == promoted
    assert ", start without radix, or with the option" in problem or not promoted
    assert problem.count(".") == 1, "one sentence"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stock_serves_them_when_asked_and_the_log_says_so(asynchronous, caplog):
    logger = __import__("logging").getLogger("vllm")
    logger.propagate = True
    try:
        made = make([WINDOW], asynchronous, on_unsupported="stock")
    finally:
        logger.propagate = False
    assert type(made) is (AsyncScheduler if asynchronous else Scheduler)
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
    for part in ("on vLLM 0.32", "RadixKVCacheManager", "policy=prefix", "overtakes=3"):
        assert part in line
    assert "left to stock vLLM: nothing" in line
