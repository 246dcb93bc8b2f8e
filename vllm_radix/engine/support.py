"""What radix can serve: one sentence per reason why not, naming the fix."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import (
    AsyncScheduler,
    ChunkedLocalAttentionManager,
    DiffusionAsyncScheduler,
    DiffusionScheduler,
    FullAttentionManager,
    KVCacheConfig,
    KVCacheSpecRegistry,
    Scheduler,
    UniformTypeKVCacheSpecs,
    VllmConfig,
)
from vllm_radix.engine.groups import GROUP_TYPES

_FIX = 'start without radix, or with the option on_unsupported="stock"'

_DRAFTS = ("eagle", "eagle3", "mtp")
"""Ways to draft whose KV depends on one token more than the model's own."""

_COPYING_WORKERS = ("vllm.v1.worker.", "vllm_radix.attention.")
"""Where the workers live that are known to copy blocks when told to."""

_registration_problem: str | None = None


def remember_problem(problem: str | None) -> None:
    """Keep why the plugin could not register, for whoever asks for radix."""
    global _registration_problem
    _registration_problem = problem


def install_problem() -> str | None:
    """Return why radix cannot be used with what is installed, or None."""
    return version_problem() or _registration_problem


def stock_scheduler_cls(vllm_config: VllmConfig) -> type:
    """Return the scheduler class that vLLM would use by itself."""
    asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
    if vllm_config.diffusion_config is not None:
        return DiffusionAsyncScheduler if asynchronous else DiffusionScheduler
    return AsyncScheduler if asynchronous else Scheduler


def version_problem() -> str | None:
    """Return why the installed vLLM is not supported, or None.

    The supported range stands in the project's own metadata and nowhere else.
    """
    try:
        installed = version("vllm")
        lines = requires("vllm-radix") or []
    except PackageNotFoundError as error:
        return f"package metadata is missing ({error}): install vllm-radix with pip"
    for line in lines:
        wanted = Requirement(line)
        if wanted.name == "vllm" and not wanted.specifier.contains(installed):
            return (
                f"vllm-radix {version('vllm-radix')} supports vllm{wanted.specifier}, "
                f"and {installed} is installed: install another version of either"
            )
    return None


def config_problem(vllm_config: VllmConfig) -> str | None:
    """Return why a configuration is not supported, or None.

    Looks at what is known before weights load.
    """
    model = vllm_config.model_config
    if model is None:
        return None
    kind = None
    if model.is_encoder_decoder:
        kind = "an encoder-decoder model (cross-attention cache)"
    elif model.is_attention_free:
        kind = "a model without attention (states alone, of which vLLM caches none)"
    elif model.is_diffusion:
        kind = "a diffusion model"
    elif vllm_config.is_mm_encoder_only:
        kind = "a multi-modal encoder alone, which keeps no KV"
    elif not model.is_prefix_caching_supported:
        # vLLM turns prefix caching off by itself here, whatever flags are given.
        what = "an encoder-only" if model.attn_type == "encoder_only" else "a pooling"
        kind = f"{what} model, of which vLLM caches no prefixes"
    if kind is not None:
        return f"radix serves models with attention, and this is {kind}: {_FIX}."
    if not vllm_config.cache_config.enable_prefix_caching:
        return (
            "radix re-uses prefixes, and prefix caching is off: drop "
            f"--no-enable-prefix-caching, {_FIX}."
        )
    return None


def early_problem(vllm_config: VllmConfig, config: RadixConfig) -> str | None:
    """Return why radix cannot serve, as far as is known before weights load, or None.

    Args:
        vllm_config: of vLLM.
        config: the options of radix.
    """
    return (
        install_problem()
        or config_problem(vllm_config)
        or public_prefix_problem(vllm_config, config)
    )


def public_prefix_problem(vllm_config: VllmConfig, config: RadixConfig) -> str | None:
    """Return why salts cannot share a public prefix in a configuration, or None."""
    if config.public_prefix == "":
        return None
    events = vllm_config.kv_events_config
    reason = None
    if vllm_config.kv_transfer_config is not None:
        reason = "a KV connector"
    elif events is not None and events.enable_kv_cache_events:
        reason = "KV cache events"
    elif vllm_config.aux_output_config.enabled:
        reason = "outputs kept beside the KV"
    if reason is None:
        return None
    return (
        f"radix option 'public_prefix' does not go with {reason}, which know blocks by "
        "hashes that differ from salt to salt: leave one of the two out, or start "
        'with the option on_unsupported="stock", where salts share nothing.'
    )


def is_one_full_group(kv_cache_config: KVCacheConfig) -> bool:
    """Return whether all layers of a model keep every token's KV, in one group."""
    return _managers(kv_cache_config) == [FullAttentionManager]


def _managers(kv_cache_config: KVCacheConfig) -> list[type | None]:
    return [
        KVCacheSpecRegistry.get_manager_class(group.kv_cache_spec, group.role)
        for group in kv_cache_config.kv_cache_groups
    ]


def layout_problem(kv_cache_config: KVCacheConfig) -> str | None:
    """Return why a model's cache layout is not supported, or None.

    Supported are groups of the types in ``GROUP_TYPES``.
    """
    if is_one_full_group(kv_cache_config):
        return None
    groups = kv_cache_config.kv_cache_groups
    managers = _managers(kv_cache_config)
    bad = []
    for group, manager in zip(groups, managers, strict=True):
        known = GROUP_TYPES.get(manager) if manager else None
        if known is None or not group.kv_cache_spec.prefix_cacheable:
            bad.append(_name(group))
            continue
        problem = known.problem(group.kv_cache_spec)
        if problem is not None:
            bad.append(problem)
    if groups and not bad:
        return None
    what = ", ".join(dict.fromkeys(bad)) or "no cache at all"
    return f"radix does not serve this model's cache, which has {what}: {_FIX}."


def whole_blocks_reason(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> str | None:
    """Return why a hit must end with a block, or None."""
    speculative = vllm_config.speculative_config
    parallel = vllm_config.parallel_config
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector, which knows whole blocks"
    if vllm_config.aux_output_config.enabled:
        return "outputs kept beside the KV, which are not copied"
    if (
        speculative is not None
        and speculative.uses_draft_kv_cache()
        and is_one_full_group(kv_cache_config)
    ):
        return "a draft model, which has KV of its own"
    if parallel.decode_context_parallel_size > 1:
        return "context parallelism, which spreads a block over devices"
    if not str(parallel.worker_cls).startswith(_COPYING_WORKERS):
        return "a worker that is not vLLM's own and may not copy blocks"
    return None


def feature_problem(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: RadixConfig
) -> str | None:
    """Return why a model with several kinds of layers cannot be served so, or None.

    Args:
        vllm_config: of vLLM.
        kv_cache_config: its groups.
        config: the options of radix.
    """
    if is_one_full_group(kv_cache_config):
        return None
    reason = _lacking(vllm_config) or _lacking_drafts(
        vllm_config, kv_cache_config, config
    )
    if reason is None:
        return None
    return (
        "radix serves models with several kinds of cached layers without "
        f"{reason}: leave it out, {_FIX}."
    )


def _lacking(vllm_config: VllmConfig) -> str | None:
    parallel = vllm_config.parallel_config
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector"
    if parallel.decode_context_parallel_size > 1:
        return "decode context parallelism"
    if parallel.prefill_context_parallel_size > 1:
        return "prefill context parallelism"
    if vllm_config.cache_config.use_replayssm:
        return "--use-replayssm"
    if str(parallel.worker_cls).startswith("vllm_radix.attention"):
        return "grouped attention (--radix.attention)"
    return None


def _lacking_drafts(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: RadixConfig
) -> str | None:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    if not speculative.uses_draft_kv_cache():
        return None
    if speculative.method not in _DRAFTS:
        return f"drafts of the method {speculative.method!r}, which keep KV"
    if vllm_config.num_prefill_lookahead_tokens > 1:
        return "MTP of several modules"
    if ChunkedLocalAttentionManager in _managers(kv_cache_config):
        return "EAGLE or MTP beside chunked attention"
    if kv_cache_config.has_mamba_layers:
        return None
    if not config.sub_block:
        return "EAGLE or MTP where hits end with blocks (option sub_block)"
    reason = whole_blocks_reason(vllm_config, kv_cache_config)
    return reason and f"EAGLE or MTP where hits end with blocks ({reason})"


def _name(group: object) -> str:
    spec = group.kv_cache_spec  # type: ignore[attr-defined]
    layers = len(group.layer_names)  # type: ignore[attr-defined]
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    return f"{type(spec).__name__} x {layers} layers"
