"""A worker that tells its attention backend which requests it runs.

vLLM's registry of attention backends is per process, so the worker puts ours in place
of the ones they derive from; vLLM chooses among them as always. What the scheduler
sends a worker holds every block id: no wire is changed, and nothing is copied back
from a device.
"""

from typing import Any, ClassVar

from vllm.logger import init_logger

from vllm_radix.attention.batch import (
    RunningBatch,
    current_batch,
    set_current_batch,
)
from vllm_radix.config import RadixConfig, not_grouped

logger = init_logger("vllm.radix")


class GroupedWorker:
    """To be put before one of vLLM's worker classes."""

    overrides: ClassVar[dict[str, str]] = {}
    """Names of vLLM's backends, and what replaces each."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.v1.attention.backends.registry import (
            AttentionBackendEnum,
            register_backend,
        )
        from vllm.v1.attention.selector import _cached_get_attn_backend

        config = RadixConfig.from_additional_config(vllm_config.additional_config)
        block_size = vllm_config.cache_config.block_size
        longest = vllm_config.model_config.max_model_len
        self._radix_strict = config.on_unsupported == "error"
        max_blocks = -(-longest // block_size) + 1
        self._radix_batch = RunningBatch(max_blocks, self._radix_strict)
        set_current_batch(self._radix_batch)
        # An engine before this one, in the same process, may have chosen already.
        _cached_get_attn_backend.cache_clear()
        for name, ours in self.overrides.items():
            member = AttentionBackendEnum[name]
            if member.is_overridden() and member.get_path() != ours:
                raise ValueError(
                    f"radix option 'attention': the attention backend {name} is "
                    f"{member.get_path()} already: drop the plugin that replaced it, "
                    'or start with attention="stock"'
                )
            register_backend(member, ours)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and check that its attention is grouped."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        others, derived, grouped, windows = set(), 0, 0, 0
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        for layer in config.compilation_config.static_forward_context.values():
            impl = getattr(layer, "impl", None)
            if impl is None:
                continue
            ours = getattr(impl, "radix_grouped", None)
            # vLLM derives a backend where a layer attends within chunks.
            builder = layer.get_attn_backend().get_builder_cls()
            if ours is None:
                others.add(layer.get_attn_backend().get_name())
            elif not builder.__module__.startswith("vllm_radix."):
                derived += 1
            elif ours:
                grouped += 1
            elif impl.window():
                windows += 1
        if others and self._radix_strict:
            chosen = f"what vLLM chose, the backend {', '.join(sorted(others))}"
            fix = f"use --attention-backend {' or '.join(self.overrides)}"
            raise ValueError(not_grouped(chosen, fix))
        if derived and self._radix_strict:
            raise ValueError(
                not_grouped(f"layers that attend within chunks ({derived} here)")
            )
        logger.info(
            "Grouped attention: %d layers; left to stock vLLM: %d with a sliding "
            "window, %d that attend within chunks%s. Timed on an H100 only.",
            grouped,
            windows,
            derived,
            f", those of {', '.join(sorted(others))}" if others else "",
        )

    def initialize_from_config(
        self, kv_cache_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Make the caches; leave attention to vLLM if their layout is not supported."""
        from vllm_radix.engine.support import is_one_full_group

        # Builders of a profiling run are not used any more.
        self._radix_batch.builders.clear()
        if not is_one_full_group(kv_cache_config):
            problem = not_grouped(
                "a model with several kinds of cached layers",
                "start with --disable-hybrid-kv-cache-manager where it makes one of "
                "them",
            )
            if self._radix_strict:
                raise ValueError(problem)
            # As the scheduler does: it is stock's, and so is attention.
            logger.warning("Attention is stock vLLM's, as asked: %s", problem)
            self._radix_batch.enabled = False
        return super().initialize_from_config(  # type: ignore[misc]
            kv_cache_config, *args, **kwargs
        )

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Warm up, our kernels first: none is compiled while requests wait."""
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        layers = config.compilation_config.static_forward_context
        for builder in self._radix_batch.builders if self._radix_batch.enabled else ():
            builder.warm_up(layers)
        return super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step, with its requests known to the attention backend."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        self._radix_batch.begin(scheduler_output, runner)
        try:
            return super().execute_model(  # type: ignore[misc]
                scheduler_output, *args, **kwargs
            )
        finally:
            self._radix_batch.end()

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """Restore vLLM's own backends, and shut down."""
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.attention.selector import _cached_get_attn_backend

        self._radix_batch.builders.clear()
        if current_batch() is self._radix_batch:
            set_current_batch(None)
            for name in self.overrides:
                AttentionBackendEnum[name].clear_override()
            _cached_get_attn_backend.cache_clear()
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]

    def radix_attention(self) -> dict[str, int]:
        """Return counts since the start; ``LLM.collective_rpc("radix_attention")``."""
        return self._radix_batch.counters.to_dict()
