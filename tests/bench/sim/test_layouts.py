"""Layouts of several cache groups: their text, and vLLM's scheduler over them."""

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_radix_bench.sim.cost_model import CostModel
from vllm_radix_bench.sim.driver import VirtualRun
from vllm_radix_bench.sim.engine import blocks_for, make_scheduler
from vllm_radix_bench.sim.layouts import Layout
from vllm_radix_bench.workloads.turn import Turn

SCHEDULERS = pytest.mark.parametrize("cls", [Scheduler, AsyncScheduler])


def scheduler(text, cls=Scheduler, block_size=32, **options):
    sizes = {"max_model_len": 4096, "max_num_batched_tokens": 2048, **options}
    return make_scheduler(
        cls,
        block_size,
        4000,
        asynchronous=cls is AsyncScheduler,
        layout=Layout.parse(text),
        **sizes,
    )


def hits(scheduler, prompts, max_tokens=1):
    """Return the tokens that each of these finds, one after the other."""
    roots = [Turn(p, max_tokens, arrival=1e3 * i) for i, p in enumerate(prompts)]
    outcome = VirtualRun(scheduler, CostModel()).run(roots)
    return [record.cached_tokens for record in outcome.records]


def siblings():
    """Return prompts of 1,000 tokens that all have and 500 that none else has."""
    own = [range(first, first + 500) for first in (2000, 3000, 4000, 5000)]
    return [[*range(1000), *mine] for mine in own]


def test_parts_become_specs_with_pages_of_the_same_size():
    layout = Layout.parse("full/32+swa:1024/64x2")
    full, *windows = layout.specs(16)
    assert type(full) is FullAttentionSpec and full.block_size == 32
    assert [type(one) for one in windows] == [SlidingWindowSpec] * 2
    assert {(w.block_size, w.sliding_window) for w in windows} == {(64, 1024)}
    (chunked,) = Layout.parse("chunked:256").specs(16)
    assert type(chunked) is ChunkedLocalAttentionSpec
    assert (chunked.block_size, chunked.attention_chunk_size) == (16, 256)
    full, *states = Layout.parse("full+mambax3").specs(528)
    assert [type(one) for one in states] == [MambaSpec] * 3
    assert {one.mamba_cache_mode for one in states} == {"align"}
    for text in ("full/32+swa:1024/64x2", "full/528+mamba/528x3", "full/16+swa:9/48"):
        pages = {one.page_size_bytes for one in Layout.parse(text).specs(16)}
        assert len(pages) == 1


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("full/16+swa:1024/16x5", "full/16+swa:1024/16x5"),
        ("full+swa:8+swa:8+full", "full+swa:8x2+full"),
        ("mambax1", "mamba"),
    ],
)
def test_a_layout_is_written_as_it_is_read(text, same):
    assert str(Layout.parse(text)) == same
    assert Layout.parse(same) == Layout.parse(text)


@pytest.mark.parametrize(
    ("text", "part", "problem"),
    [
        ("", "''", "is no part of a layout"),
        ("full+", "''", "is no part of a layout"),
        ("full+Swa:3", "'Swa:3'", "is no part of a layout"),
        ("full+swa", "'swa'", "names no window"),
        ("chunked/16", "'chunked/16'", "names no attention chunk"),
        ("mamba:3", "'mamba:3'", "has tokens, and mamba takes none"),
        ("full/0", "'full/0'", "has a number that is not from 1"),
        ("swa:1000001", "'swa:1000001'", "has a number that is not from 1"),
        ("fullx65", "'fullx65'", "has a count that is not from 1 to 64"),
    ],
)
def test_the_part_that_is_wrong_is_named(text, part, problem):
    with pytest.raises(ValueError, match="swa:TOKENS") as error:
        Layout.parse(text)
    assert f"layout {text!r}: {part} {problem}" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_vllm_has_no_cache_for_is_refused():
    with pytest.raises(ValueError, match="has 65 groups; allowed: up to 64"):
        Layout.parse("fullx64+swa:3")
    for text in ("full/16+mamba/32", "full+chunked:64/32"):
        with pytest.raises(ValueError, match="16 and 32 tokens; allowed with"):
            Layout.parse(text).at(16)
        with pytest.raises(ValueError, match="16 and 32 tokens; allowed with"):
            scheduler(text, block_size=16)


@SCHEDULERS
def test_block_sizes_are_those_of_vllms_engine_core(cls):
    made = scheduler("full/32+swa:128/64", cls)
    assert (made.block_size, made.hash_block_size) == (64, 32)
    made = scheduler("full+mamba", cls)
    assert (made.block_size, made.hash_block_size) == (32, 32)
    assert made.cache_config.mamba_cache_mode == "align"
    made = scheduler("full/512+mamba/512", cls, prefix_match_unit=32)
    assert (made.block_size, made.hash_block_size) == (512, 32)
    assert made.cache_config.block_size == 512


@SCHEDULERS
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("full", [0, 992, 992, 992]),
        # vLLM sees a junction at the second request: the third one profits.
        ("full+swa:128", [0, 0, 992, 992]),
        ("full/512+mamba/512", [0, 0, 512, 512]),
        ("full+chunked:256", [0, 992, 992, 992]),
        ("full/32+swa:128/64", [0, 0, 960, 960]),
    ],
)
def test_stock_finds_what_its_groups_can_all_go_on_from(cls, text, found):
    assert hits(scheduler(text, cls), siblings()) == found


def test_engine_arguments_go_to_vllm():
    kept = scheduler("full+swa:128", prefix_cache_retention_interval=None)
    assert hits(kept, siblings()) == [0, 992, 992, 992]
    prompt = list(range(1500))
    longer = [prompt, [*prompt, *range(9000, 9100)]]
    assert hits(scheduler("full/512+mamba/512"), longer) == [0, 1024]
    fine = scheduler("full/512+mamba/512", prefix_match_unit=32)
    assert hits(fine, longer) == [0, 1472]


def test_the_blocks_that_vllm_needs_to_start():
    need = {
        text: blocks_for(Layout.parse(text), 32, 3200, 640)
        for text in ("full", "full+mambax3", "swa:128", "full+swa:128")
    }
    assert need["full"] == 100
    assert need["full+mambax3"] == 100 + 3 * 2
    # The window, the tokens of a step, and a block that both may begin in.
    assert need["swa:128"] == -(-(128 - 1 + 640) // 32) + 1
    assert need["full+swa:128"] == need["full"] + need["swa:128"]
