"""vLLM's attention backends, with shared prefixes read once where that pays.

Mixins, to be put before a backend of vLLM's, its metadata builder and its
implementation (``cpu.py``, ``triton.py``, ``flash.py``). The builder asks the planner
once per step; the implementation runs our kernels where there is a plan, and vLLM's
own, unchanged, where there is none. Keys and values are written by vLLM.

CUDA graphs: a captured graph would replay the kernel it was captured with, whatever a
later step's plan says. So these backends declare that they support no full graphs, and
vLLM captures piecewise: everything but attention.
"""

import functools
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_radix.attention.batch import RunningBatch, current_batch
from vllm_radix.attention.cost import DEVICES, Layer
from vllm_radix.attention.plan_buffers import PlanBuffers, max_partials
from vllm_radix.attention.planner import AttentionPlanner, Limits, Plan
from vllm_radix.config import not_grouped
from vllm_radix_kernels.grouped_attention import grouped_attention
from vllm_radix_kernels.tiles import (
    MAX_HEAD_SIZE,
    Tile,
    architecture_of,
    choose,
    table_name,
)


def asked_for(vllm_config: Any) -> bool:
    """Return whether an engine's workers group attention."""
    worker = str(vllm_config.parallel_config.worker_cls)
    return worker.startswith("vllm_radix.attention.")


class GroupedBuilder:
    """Plans a step's attention, on top of one of vLLM's metadata builders."""

    stock_tile_rows = 16
    """Rows of a tile of vLLM's kernel, for the count of what it would load."""

    stock_splits = False
    """Whether vLLM's kernel splits requests until all processors have work."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs
        )
        self._query_dtype = vllm_config.model_config.dtype
        # A neighbour in the same process may have been started without.
        self._batch = current_batch() if asked_for(vllm_config) else None
        # vLLM wraps builders whose layers see other batches than the scheduler's
        # (chunked attention, fast prefill); its wrappers override ``build``.
        self._plans = type(self).build is GroupedBuilder.build
        if self._batch is None or not self._plans:
            return
        try:
            limits, self._tile = self._limits(kv_cache_spec, vllm_config)
        except ValueError:
            if self._batch.strict:
                raise
            self._plans = False
            return
        self.planner = AttentionPlanner(limits)
        self._batch.builders.append(self)

    def _limits(self, kv_cache_spec: Any, vllm_config: Any) -> tuple[Limits, Tile]:
        """Return what to plan for.

        Raises:
            ValueError: our kernels serve neither these heads nor this device.
        """
        device: torch.device = self.device  # type: ignore[attr-defined]
        layer = Layer(
            num_heads=int(self._num_heads),
            num_kv_heads=kv_cache_spec.num_kv_heads,
            head_size=kv_cache_spec.head_size,
            kv_bytes=kv_cache_spec.dtype.itemsize,
        )
        architecture = table_name(architecture_of(device))
        tile = choose(architecture, layer.head_size, layer.group, self._query_dtype)
        speculative = vllm_config.speculative_config
        scheduler = vllm_config.scheduler_config
        limits = Limits(
            layer=layer,
            device=DEVICES[architecture],
            # The scheduler's blocks, whatever the kernels' are.
            block_size=vllm_config.cache_config.block_size,
            tile_rows=tile.m,
            stock_tile_rows=self.stock_tile_rows,
            stock_splits=self.stock_splits,
            max_tokens=scheduler.max_num_batched_tokens,
            max_items=16 * (scheduler.max_num_seqs + scheduler.max_num_batched_tokens),
            max_partials=max_partials(layer),
            slack=speculative.num_speculative_tokens or 0 if speculative else 0,
        )
        return limits, tile

    @functools.cached_property
    def buffers(self) -> PlanBuffers:
        """The plan on the device; no memory is taken before it is needed."""
        device: torch.device = self.device  # type: ignore[attr-defined]
        return PlanBuffers(self.planner.limits, self._tile, device)

    @property
    def _num_heads(self) -> int:
        """Query heads of the builder's layers, as vLLM's builder has them."""
        raise NotImplementedError

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Return that full graphs are not supported; see the module."""
        if vllm_config is not None and not asked_for(vllm_config):
            return super().get_cudagraph_support(  # type: ignore[misc]
                vllm_config, kv_cache_spec
            )
        from vllm.v1.attention.backend import AttentionCGSupport

        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return vLLM's metadata, with a plan or without."""
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build, **kwargs
        )
        metadata.radix_plan = None
        batch = self._batch
        if batch is not None and self._plans and not fast_build:
            plan = self._plan(common_attn_metadata, batch)
            if plan is not None:
                metadata.radix_plan = self.buffers.load(plan)
        return metadata

    def update_block_table(self, *args: Any, **kwargs: Any) -> Any:
        """Return vLLM's metadata for other block tables: without a plan."""
        metadata = super().update_block_table(*args, **kwargs)  # type: ignore[misc]
        metadata.radix_plan = None
        return metadata

    def warm_up(self, layers: Any) -> None:
        """Compile the kernels, by computing one token with one key.

        Args:
            layers: vLLM's attention layers by name, with their caches bound.
        """
        kinds: dict[Any, Any] = {}
        for name in self.layer_names:  # type: ignore[attr-defined]
            layer, impl = layers[name], layers[name].impl
            if getattr(impl, "radix_grouped", False):
                # What kernels are specialised for, beyond the builder's own layer.
                features = (impl.logits_soft_cap, impl.alibi_slopes is None)
                strides = layer.kv_cache.stride()
                kinds.setdefault((*features, impl.sinks is None, strides), layer)
        # Layers that are all vLLM's need no plans.
        self._plans = bool(kinds)
        if not kinds:
            return
        device: torch.device = self.device  # type: ignore[attr-defined]
        plan = self.planner.propose(np.zeros((1, 1), np.int32), [1], [0, 1])
        assert plan is not None, "there is room for one token"
        metadata = SimpleNamespace(
            radix_plan=self.buffers.load(plan),
            block_table=torch.zeros((1, 1), dtype=torch.int32, device=device),
            seq_lens=torch.ones(1, dtype=torch.int32, device=device),
            query_start_loc=torch.arange(2, dtype=torch.int32, device=device),
        )
        heads = self.planner.limits.layer
        size = (1, heads.num_heads, heads.head_size)
        query = torch.zeros(size, dtype=self._query_dtype, device=device)
        for layer in kinds.values():
            output = torch.empty_like(query)
            layer.impl.forward(
                layer, query, query, query, layer.kv_cache, metadata, output
            )

    def _plan(self, common: Any, batch: RunningBatch) -> Plan | None:
        """Return the plan of a batch, and count it; None leaves the batch to vLLM."""
        if common.causal is not True or common.mm_req_doc_ranges:
            return None
        if getattr(common, "rswa_prefix_lens", None) is not None:
            return None
        if common.seq_lens_cpu_upper_bound is None:
            return None
        request_ids = batch.request_ids(common)
        tables = None if request_ids is None else batch.tables.gather(request_ids)
        if tables is None:
            return None
        count = len(tables)
        plan = self.planner.plan(
            tables,
            common.seq_lens_cpu_upper_bound[:count].numpy(),
            common.query_start_loc_cpu[: count + 1].numpy(),
        )
        counters = batch.counters
        counters.steps += 1
        counters.plans_made = self.planner.made + self.planner.refreshed
        counters.plans_kept = self.planner.kept
        if plan is not None:
            counters.grouped_steps += 1
            counters.grouped_extends += len(plan.rows) > count
            counters.nodes += plan.num_nodes
            counters.levels = max(counters.levels, plan.levels)
            counters.loaded_tokens += plan.work.loaded
            counters.stock_tokens += plan.stock_work.loaded
        return plan


class GroupedImpl:
    """Runs a step's plan, on top of one of vLLM's attention implementations."""

    attend = staticmethod(grouped_attention)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        asked = config is None or asked_for(config)
        batch = current_batch() if asked else None
        problem = self.unsupported()
        if problem is not None and batch is not None and batch.strict:
            raise ValueError(not_grouped(problem))
        # With a window, a group reads keys that most of its rows do not see.
        self.radix_grouped = asked and problem is None and not self.window()

    def unsupported(self) -> str | None:
        """Return what about this layer our kernels do not compute, or None."""
        layer: Any = self
        kind = str(getattr(layer.attn_type, "value", layer.attn_type))
        if kind != "decoder":
            return f"{kind} attention"
        if layer.head_size > MAX_HEAD_SIZE:
            return f"heads of {layer.head_size} ({MAX_HEAD_SIZE} at most)"
        if layer.kv_sharing_target_layer_name is not None:
            return "layers that share another's KV cache"
        if getattr(layer, "use_alibi_sqrt", False):
            return "ALiBi with square roots"
        if getattr(layer, "chunk_lookback", -1) != -1:
            return "chunked attention"
        if "per_token" in str(layer.kv_cache_dtype):
            return f"a KV cache of type {layer.kv_cache_dtype}"
        return None

    def fused_output_quant_supported(self, *_: Any) -> bool:
        """Return False: our kernels do not quantise what they write."""
        return False

    def window(self) -> int:
        """Return the layer's sliding window, 0 for none."""
        window: Any = self.sliding_window  # type: ignore[attr-defined]
        width = window[0] + 1 if isinstance(window, tuple) else window
        return max(int(width or 0), 0)

    def caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as [blocks, page, KV heads, D] views."""
        # vLLM's layout is [blocks, KV heads, page, 2 x D], in any physical order.
        keys, values = kv_cache.transpose(1, 2).split(
            self.head_size,  # type: ignore[attr-defined]
            dim=-1,
        )
        return keys, values

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention: ours where the step has a plan, else vLLM's."""
        plan = getattr(attn_metadata, "radix_plan", None)
        quantised = output_scale is not None or output_block_scale is not None
        if plan is None or quantised or not self.radix_grouped:
            result: torch.Tensor = super().forward(  # type: ignore[misc]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
            return result
        ours: Any = self
        keys, values = self.caches(kv_cache)
        self.attend(
            query,
            keys,
            values,
            output,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            plan,
            ours.scale,
            softcap=float(ours.logits_soft_cap or 0.0),
            slopes=ours.alibi_slopes,
            sinks=ours.sinks,
            k_scale=layer._k_scale,
            v_scale=layer._v_scale,
        )
        return output


class GroupedBackend:
    """What a backend of ours says of itself, before what vLLM's says.

    Attributes:
        impl_cls: the implementation.
        builder_cls: the metadata builder.
    """

    impl_cls: ClassVar[type]
    builder_cls: ClassVar[type]

    @classmethod
    def get_impl_cls(cls) -> type:
        """Return the implementation."""
        return cls.impl_cls

    @classmethod
    def get_builder_cls(cls) -> type:
        """Return the metadata builder."""
        return cls.builder_cls

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Return False: plans are made from the query lengths that the host knows."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Return False: how a row's keys are split depends on the rest of the batch."""
        return False
