"""Backends for GPUs, as far as a CPU shows: their plans, caches and refusals.

What vLLM's classes do by themselves is theirs; the kernels are interpreted.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.batches import (
    Layer,
    agree,
    make_cache,
    make_limits,
    plan_of,
    reference,
    shared,
)
from support.worker_output import worker_output
from vllm_radix.attention.backends.base import GroupedBuilder
from vllm_radix.attention.batch import RunningBatch, set_current_batch
from vllm_radix.attention.plan_buffers import PlanBuffers
from vllm_radix_kernels.interpreter import interpreted
from vllm_radix_kernels.tiles import Tile

LAYER = Layer(4, 2, 64, 4)


@pytest.fixture
def step():
    step = RunningBatch(64, strict=True)
    set_current_batch(step)
    yield step
    set_current_batch(None)


class PlainBuilder:
    """Stands for one of vLLM's builders."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.device, self.layer_names = device, layer_names

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace()

    def update_block_table(self, metadata, block_table, slot_mapping):
        return SimpleNamespace(**vars(metadata))


class Builder(GroupedBuilder, PlainBuilder):
    _num_heads = LAYER.num_heads


def config(**fields):
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        cache_config=SimpleNamespace(block_size=16),
        speculative_config=None,
        parallel_config=SimpleNamespace(
            worker_cls="vllm_radix.attention.cpu_worker.Worker"
        ),
        **fields,
    )


def builder():
    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.float32)
    return Builder(spec, ["layer"], config(), torch.device("cpu"))


def begin(step, batch, second_runner=False):
    """Begin a step of a batch; return its metadata."""
    names = [f"r{row}" for row in range(len(batch.seq_lens))]
    new = [
        (name, batch.tables[row, : -(-int(batch.seq_lens[row]) // batch.page)])
        for row, name in enumerate(names)
    ]
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=names))
    indices = None
    if second_runner:
        indices = np.arange(len(names)) + 3
        known = dict(zip(indices.tolist(), names, strict=True))
        runner = SimpleNamespace(req_states=SimpleNamespace(index_to_req_id=known))
    scheduled = dict(zip(names, batch.rows.tolist(), strict=True))
    step.begin(worker_output(new, scheduled=scheduled), runner)
    return SimpleNamespace(
        query_start_loc_cpu=torch.from_numpy(batch.starts),
        seq_lens_cpu_upper_bound=torch.from_numpy(batch.seq_lens),
        causal=True,
        mm_req_doc_ranges=None,
        req_idx=indices,
    )


@pytest.mark.parametrize("second_runner", [False, True])
def test_both_model_runners_get_the_same_plan(step, second_runner):
    batch = shared(blocks=8, levels=2, rows=2)
    metadata = builder().build(0, begin(step, batch, second_runner))
    expected = plan_of(batch, make_limits(batch, LAYER, tile_rows=64))
    plan = metadata.radix_plan
    assert int(plan.num_items) == len(expected.items)
    assert torch.equal(plan.items[: len(expected.items)], torch.tensor(expected.items))
    assert step.counters.grouped_steps == step.counters.grouped_extends == 1


def test_what_is_not_a_step_of_ours_is_vllms(step):
    batch = shared(blocks=8)
    built = builder()
    common = begin(step, batch)
    assert built.build(0, common).radix_plan is not None
    assert built.build(0, common, fast_build=True).radix_plan is None
    for name, value in (
        ("causal", False),
        ("causal", torch.ones(5)),
        ("mm_req_doc_ranges", {0: [(1, 5)]}),
        ("seq_lens_cpu_upper_bound", None),
    ):
        other = SimpleNamespace(**{**vars(common), name: value})
        assert built.build(0, other).radix_plan is None, name
    step.end()
    assert built.build(0, common).radix_plan is None
    begin(step, batch)
    assert built.build(0, common).radix_plan is not None
    step.enabled = False
    assert built.build(0, common).radix_plan is None


def test_builder_wrapped_by_vllm_plans_nothing(step):
    """As vLLM does for attention within chunks: rows are the scheduler's, keys not."""

    class Chunked(Builder):
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.float32)
    wrapped = Chunked(spec, ["layer"], config(), torch.device("cpu"))
    common = begin(step, shared(blocks=8))
    assert builder().build(0, common).radix_plan is not None
    assert wrapped.build(0, common).radix_plan is None
    assert wrapped not in step.builders


def test_metadata_for_other_block_tables_has_no_plan(step):
    built = builder()
    metadata = built.build(0, begin(step, shared(blocks=8)))
    assert metadata.radix_plan is not None
    assert built.update_block_table(metadata, None, None).radix_plan is None


def test_metadata_that_was_derived_for_the_second_runner_has_no_plan(step):
    common = begin(step, shared(blocks=8), second_runner=True)
    common.req_idx = None
    assert builder().build(0, common).radix_plan is None


def test_warming_up_runs_the_kernels_of_each_kind_of_layer(step, monkeypatch):
    calls = []
    cache = torch.zeros(3, 2, 16, 128)

    class Impl:
        radix_grouped, logits_soft_cap, alibi_slopes, sinks = True, 0, None, None

        def forward(self, layer, q, k, v, kv_cache, metadata, output):
            calls.append((tuple(q.shape), q.dtype, int(metadata.radix_plan.num_items)))

    layer = SimpleNamespace(impl=Impl(), kv_cache=cache)
    capped = SimpleNamespace(impl=Impl(), kv_cache=cache)
    capped.impl.logits_soft_cap = 30.0
    built = builder()
    built.layer_names = ["a", "b", "c"]
    built.warm_up({"a": layer, "b": layer, "c": capped})
    assert calls == [((1, 4, 64), torch.float32, 1)] * 2
    # The first step's plan is another, and is uploaded.
    batch = shared(blocks=8)
    plan = built.build(0, begin(step, batch)).radix_plan
    expected = plan_of(batch, built.planner.limits)
    assert int(plan.num_items) == len(expected.items) > 1
    assert torch.equal(plan.rows[: len(expected.rows)], torch.tensor(expected.rows))


def test_where_all_layers_have_windows_nothing_is_planned_or_allocated(step):
    built = builder()
    windowed = SimpleNamespace(impl=SimpleNamespace(radix_grouped=False))
    built.warm_up({"layer": windowed})
    assert built.build(0, begin(step, shared(blocks=8))).radix_plan is None
    assert "buffers" not in vars(built)


def test_an_engine_beside_a_grouped_one_is_left_alone(step):
    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.float32)
    neighbour = config()
    neighbour.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    built = Builder(spec, ["layer"], neighbour, torch.device("cpu"))
    assert built.build(0, begin(step, shared(blocks=8))).radix_plan is None
    assert step.builders == []


@pytest.mark.parametrize("strict", [True, False])
def test_heads_that_no_tile_holds_are_refused_or_left_to_stock(step, strict):
    step.strict = strict
    spec = SimpleNamespace(num_kv_heads=2, head_size=512, dtype=torch.float32)
    arguments = (spec, ["layer"], config(), torch.device("cpu"))
    if strict:
        with pytest.raises(ValueError, match="head size 512"):
            Builder(*arguments)
    else:
        built = Builder(*arguments)
        assert built.build(0, begin(step, shared(blocks=8))).radix_plan is None


def test_the_backends_that_vllm_derives_are_told_apart():
    from vllm.model_executor.layers.attention import chunked_local_attention

    from vllm_radix.attention.backends.triton import (
        GroupedTritonBackend,
        GroupedTritonBuilder,
    )

    derived = chunked_local_attention.create_chunked_local_attention_backend(
        GroupedTritonBackend, 8192
    )
    made = derived.get_builder_cls()
    assert issubclass(made, GroupedTritonBuilder)
    assert made.build is not GroupedBuilder.build
    assert not made.__module__.startswith("vllm_radix.")
    assert GroupedTritonBuilder.build is GroupedBuilder.build


def test_unsupported_layout_is_refused_or_left_to_stock(step):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from support.engine_double import make_kv_cache_config
    from vllm_radix.attention.worker import GroupedWorker

    class Worker(GroupedWorker):
        def __init__(self, strict):
            self._radix_strict, self._radix_batch = (
                strict,
                RunningBatch(8, strict),
            )

    class Plain:
        def initialize_from_config(self, kv_cache_config):
            return "made"

    made = type("Made", (Worker, Plain), {})
    spec = {"block_size": 16, "num_kv_heads": 1, "head_size": 8}
    full = FullAttentionSpec(**spec, dtype=torch.float32)
    window = SlidingWindowSpec(**spec, dtype=torch.float32, sliding_window=64)
    one = make_kv_cache_config(specs=[full])
    several = make_kv_cache_config(specs=[window, full])
    with pytest.raises(ValueError, match="several kinds of cached layers"):
        made(strict=True).initialize_from_config(several)
    lenient = made(strict=False)
    assert lenient.initialize_from_config(one) == "made"
    assert lenient._radix_batch.enabled
    assert lenient.initialize_from_config(several) == "made"
    assert not lenient._radix_batch.enabled


def test_nothing_shared_is_vllms_kernel_and_nothing_is_uploaded(step):
    batch = shared(members=1, blocks=8)
    built = builder()
    assert built.build(0, begin(step, batch)).radix_plan is None
    assert built.buffers.uploads == 0
    assert step.counters.steps == 1
    assert step.counters.grouped_steps == 0


def test_plan_that_still_holds_is_uploaded_once(step):
    batch = shared(blocks=8)
    built = builder()
    first = built.build(0, begin(step, batch)).radix_plan
    for _ in range(3):
        batch.seq_lens += 1
        assert built.build(0, begin(step, batch)).radix_plan is first
    assert built.buffers.uploads == 1


def impl(kind, **fields):
    """Return an implementation of one of the GPU backends."""
    if kind == "triton":
        from vllm_radix.attention.backends.triton import GroupedTritonImpl as cls
    else:
        from vllm_radix.attention.backends.flash import GroupedFlashImpl as cls
    arguments = {
        "num_heads": LAYER.num_heads,
        "head_size": LAYER.head_size,
        "scale": LAYER.head_size**-0.5,
        "num_kv_heads": LAYER.num_kv_heads,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        **fields,
    }
    return cls(**arguments)


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_triton_cache_is_read_in_either_memory_order(step, order):
    batch = shared(blocks=8, levels=2, rows=3)
    limits = make_limits(batch, LAYER)
    buffers = PlanBuffers(limits, Tile(16, 64, 1, 1), torch.device("cpu"))
    plan = buffers.load(plan_of(batch, limits))
    keys, values = make_cache(batch, LAYER)
    # vLLM's: [blocks, KV heads, page, keys | values], in either physical order.
    cache = torch.cat([keys, values], 3).transpose(1, 2)
    cache = cache.contiguous() if order == "HND" else cache
    q = torch.randn(int(batch.starts[-1]), 4, 64)
    out = torch.full_like(q, float("nan"))
    layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))
    metadata = SimpleNamespace(
        radix_plan=plan,
        block_table=torch.from_numpy(batch.tables),
        seq_lens=torch.from_numpy(batch.seq_lens),
        query_start_loc=torch.from_numpy(batch.starts),
    )
    with interpreted():
        impl("triton").forward(layer, q, q, q, cache, metadata, out)
    agree(out, reference(batch, LAYER, q, keys, values), 3e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("triton", {"attn_type": "encoder_only"}, "encoder_only attention"),
        ("triton", {"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ("triton", {"head_size": 512}, "heads of 512"),
        ("triton", {"kv_sharing_target_layer_name": "l"}, "share another's KV cache"),
        ("triton", {"use_alibi_sqrt": True}, "ALiBi with square roots"),
        ("triton", {"chunk_lookback": 1, "sliding_window": 64}, "chunked attention"),
        ("triton", {"kv_cache_dtype": "int8_per_token_head"}, "int8_per_token_head"),
    ],
)
def test_layers_that_are_not_served_are_refused_by_name(step, kind, fields, named):
    with pytest.raises(ValueError, match=f"does not serve .*{named}") as refused:
        impl(kind, **fields)
    assert 'on_unsupported="stock"' in str(refused.value)
    step.strict = False
    assert impl(kind, **fields).radix_grouped is False


def test_layers_with_a_window_are_vllms_within_a_served_model(step):
    assert impl("triton").radix_grouped is True
    windowed = impl("triton", sliding_window=128)
    assert windowed.window() == 128
    assert windowed.radix_grouped is False


@pytest.mark.parametrize("name", ["triton", "flash", "cpu"])
def test_no_backend_promises_full_graphs(name):
    from importlib import import_module

    from vllm.v1.attention.backend import AttentionCGSupport

    module = import_module(f"vllm_radix.attention.backends.{name}")
    backend = next(
        cls
        for cls in vars(module).values()
        if getattr(cls, "get_builder_cls", None) and cls.__module__ == module.__name__
    )
    support = backend.get_builder_cls().get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.NEVER
    assert not backend.supports_device_cpu_query_lens_mismatch()
    assert not backend.supports_batch_invariance()
    assert not backend.get_impl_cls().fused_output_quant_supported(None, None)
    # vLLM looks its backends up by these names.
    assert backend.get_name() in ("TRITON_ATTN", "FLASH_ATTN", "CPU_ATTN")


def test_planner_and_kernel_mean_the_same_by_an_item():
    """Said twice, for the planner imports no torch."""
    from vllm_radix.attention import planner
    from vllm_radix_kernels import grouped_attention as kernel

    assert (planner.ITEM, planner.OPEN_END) == (kernel.ITEM, kernel.OPEN_END)
