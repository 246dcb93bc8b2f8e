"""What radix can serve: one sentence per reason why not, naming the fix."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from vllm_radix.engine.compat import (
    AsyncScheduler,
    ChunkedLocalAttentionManager,
    DiffusionAsyncScheduler,
    DiffusionScheduler,
    FullAttentionManager,
    KVCacheConfig,
    KVCacheSpecRegistry,
    Scheduler,
    SlidingWindowManager,
    UniformTypeKVCacheSpecs,
    VllmConfig,
)

_FIX = 'start without radix, or with the option on_unsupported="stock"'

# vLLM can keep all tokens of these beside full attention.
_LOCAL = {FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager}


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
        kind = "a model without attention (state-space cache)"
    elif model.is_hybrid:
        kind = "a hybrid model (attention and state-space caches)"
    elif model.is_diffusion:
        kind = "a diffusion model"
    elif vllm_config.is_mm_encoder_only:
        kind = "a multi-modal encoder alone, which keeps no KV"
    elif not model.is_prefix_caching_supported:
        # vLLM turns prefix caching off by itself here, whatever flags are given.
        what = "an encoder-only" if model.attn_type == "encoder_only" else "a pooling"
        kind = f"{what} model, of which vLLM caches no prefixes"
    if kind is not None:
        return f"radix serves full-attention models, and this is {kind}: {_FIX}."
    if not vllm_config.cache_config.enable_prefix_caching:
        return (
            "radix re-uses prefixes, and prefix caching is off: drop "
            f"--no-enable-prefix-caching, {_FIX}."
        )
    return None


def layout_problem(kv_cache_config: KVCacheConfig) -> str | None:
    """Return why a model's cache layout is not supported, or None.

    Supported is one group of layers that keep every token's KV.
    """
    groups = kv_cache_config.kv_cache_groups
    managers = [
        KVCacheSpecRegistry.get_manager_class(group.kv_cache_spec, group.role)
        for group in groups
    ]
    if managers == [FullAttentionManager]:
        return None
    names = ", ".join(map(_name, groups)) or "no cache at all"
    fix = _FIX
    kinds = set(managers)
    if FullAttentionManager in kinds and len(kinds) > 1 and kinds <= _LOCAL:
        fix = (
            "start with --disable-hybrid-kv-cache-manager, which makes the local "
            f"layers keep every token's KV as well, {_FIX}"
        )
    return (
        "radix serves models with one full-attention cache group, and this model "
        f"has: {names}; {fix}."
    )


def _name(group: object) -> str:
    spec = group.kv_cache_spec  # type: ignore[attr-defined]
    layers = len(group.layer_names)  # type: ignore[attr-defined]
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    window = getattr(spec, "sliding_window", None)
    return f"{type(spec).__name__}{f' of {window}' if window else ''} x {layers} layers"
