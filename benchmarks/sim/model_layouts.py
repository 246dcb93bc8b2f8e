"""The layout that vLLM makes of a model, from its config.json alone.

The kinds of layers come from the configuration, their grouping from vLLM. Nothing is
loaded but the class of a model that has states, which knows their size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_radix_bench.sim.layouts import Group, Layout

_KINDS: dict[str, tuple[str, ...]] = {
    "full_attention": ("full",),
    "attention": ("full",),
    "sliding_attention": ("swa",),
    "chunked_attention": ("chunked",),
    "linear_attention": ("mamba",),
    "mamba": ("mamba",),
    "conv": ("mamba",),
    "hybrid": ("full", "mamba"),
    "moe": (),
    "mlp": (),
}
"""What layers of a configuration's types keep, in vLLM's order."""
_TYPES = ("layer_types", "layers_block_type")
"""Fields that list the types of layers."""
_NOT_UNDERSTOOD = ("index_topk", "compress_ratios", "attn_type_list", "block_configs")
"""Fields of models whose caches are none of the kinds here."""
_BOTH_IN_EACH = ("falcon_h1",)
"""Models each of whose layers has attention and a state."""
_BLOCK_SIZE = 16
"""Of attention on a GPU, and what its blocks are multiples of."""


def layout_of_model(folder: Path) -> Layout:
    """Return the layout of a model, with the sizes of blocks that a GPU has.

    Args:
        folder: with its config.json.

    Raises:
        ValueError: there is none, or something in it is not understood here; the
            message names it.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model:{folder}: no config.json is in that folder")
    try:
        with silence():
            config = EngineArgs(
                model=str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                block_size=_BLOCK_SIZE,
            ).create_engine_config()
    # Whatever vLLM and transformers say of a configuration they do not know.
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, ValidationError):
            said = error.errors()[0]["msg"]
        raise ValueError(f"model:{folder}: vLLM does not take it: {said}") from error
    try:
        return layout_of_config(config)
    except ValueError as error:
        raise ValueError(
            f"model:{folder}: {error}; write the layout out as full+swa:TOKENS"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep vLLM's tracebacks from the terminal: what it raises is told."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _NotUnderstoodError(ValueError):
    """Says what is not understood."""


def layout_of_config(config: VllmConfig) -> Layout:
    """Return the layout of a model, with the sizes of blocks that a GPU has.

    Args:
        config: of the model; changed.

    Raises:
        ValueError: something in it is not understood here; the message names it.
    """
    model = config.model_config
    text = model.hf_text_config
    if model.is_encoder_decoder or model.runner_type != "generate":
        raise _NotUnderstoodError("it is no decoder that generates text")
    for name in _NOT_UNDERSTOOD:
        if getattr(text, name, None) is not None:
            raise _NotUnderstoodError(f"its field {name} is not understood here")
    layers = _layers(model)
    block_size = _BLOCK_SIZE
    if any(group.kind == "mamba" for _, group in layers):
        if model.use_mla:
            raise _NotUnderstoodError("states beside MLA are not understood here")
        heads = model.get_num_kv_heads(config.parallel_config)
        width = heads * model.get_head_size()
        per_token = 2 * width * get_dtype_size(model.dtype)
        block_size *= cdiv(_state_bytes(config), block_size * per_token)
    return _grouped(config, layers, block_size)


def _layers(model: Any) -> list[tuple[int, Group]]:
    """Return what layers keep, as groups of their own, with the layers' numbers."""
    text = model.hf_text_config
    field = next((name for name in _TYPES if getattr(text, name, None)), None)
    if field is None:
        return _layers_without_types(model)
    types: Sequence[str] = getattr(text, field)
    # The last layers of Gemma 3n and 4 read the caches of others.
    types = types[: len(types) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        known = ", ".join(_KINDS)
        raise _NotUnderstoodError(
            f"its {field} has {', '.join(map(repr, unknown))}, and understood are "
            f"{known}"
        )
    tokens = {
        "swa": getattr(text, "sliding_window", None),
        "chunked": getattr(text, "attention_chunk_size", None),
    }
    layers = []
    for number, one in enumerate(types):
        for kind in _KINDS[one]:
            if kind in tokens and not tokens[kind]:
                raise _NotUnderstoodError(
                    f"its {field} has {one!r}, and no field tells how many tokens"
                )
            layers.append((number, Group(kind, tokens.get(kind) or 0)))
    return layers


def _layers_without_types(model: Any) -> list[tuple[int, Group]]:
    text = model.hf_text_config
    if model.is_attention_free:
        each = [Group("mamba")]
    elif text.model_type in _BOTH_IN_EACH:
        each = [Group("full"), Group("mamba")]
    elif model.is_hybrid:
        fields = " or ".join(_TYPES)
        raise _NotUnderstoodError(f"it is a hybrid model without {fields}")
    else:
        window = model.get_sliding_window()
        each = [Group("swa", window) if window else Group("full")]
    return [(i, group) for i in range(text.num_hidden_layers) for group in each]


def _state_bytes(config: VllmConfig) -> int:
    """Return the bytes of a layer's state, of which its model's class knows."""
    model = config.model_config
    cls, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    if hasattr(cls, "get_mamba_specs_from_config"):
        raise _NotUnderstoodError("it has states of several sizes")
    if not hasattr(cls, "get_mamba_state_shape_from_config"):
        raise _NotUnderstoodError(
            f"vLLM's {cls.__name__} does not tell the size of its states"
        )
    spec = MambaSpec(
        block_size=-1,
        shapes=cls.get_mamba_state_shape_from_config(config),
        dtypes=cls.get_mamba_state_dtype_from_config(config),
    )
    return spec.page_size_bytes


def _grouped(
    config: VllmConfig, layers: list[tuple[int, Group]], block_size: int
) -> Layout:
    """Return the groups that vLLM puts layers into.

    Args:
        config: of the model.
        layers: their numbers, and what each keeps.
        block_size: of all layers, before vLLM makes their pages equal.
    """
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    # A GPU's, layer by layer: pages of unlike sizes are made equal.
    config.cache_config.kv_cache_layout = "LBNHC"
    architecture = config.model_config.model_arch_config
    named, specs = {}, {}
    for number, one in layers:
        name = f"layers.{number}.{one.kind}"
        named[name] = replace(one, block_size=block_size)
        sizes = architecture[number]
        specs[name] = named[name].spec(sizes.total_num_kv_heads * sizes.head_size)
    return Layout(
        tuple(
            replace(
                named[group.layer_names[0]], block_size=group.kv_cache_spec.block_size
            )
            for group in get_kv_cache_groups(config, specs)
        )
    )
