"""The layout that vLLM makes of a model, from its config.json alone.

The kinds of layers come from the configuration, their grouping from vLLM. Nothing is
loaded but the class of a model that has states, which knows their size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec

from vllm_radix.engine.compat import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
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
    config = _config_of(folder, "model:")
    try:
        return _as_layout(_groups(config))
    except _NotUnderstoodError as error:
        raise ValueError(
            f"model:{folder}: {error}; write the layout out as full+swa:TOKENS"
        ) from error


def _config_of(folder: Path, prefix: str) -> VllmConfig:
    """Return vLLM's configuration of a model.

    Raises:
        ValueError: vLLM does not take it; the message begins with the prefix.
    """
    try:
        with silence():
            return EngineArgs(
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
        message = f"{prefix}{folder}: vLLM does not take it: {said}"
        raise ValueError(message) from error


@dataclass(frozen=True)
class ModelCache:
    """The KV cache of a model.

    Attributes:
        layout: its groups; None where all layers are full attention.
        bytes_per_block: of a block, with all layers of its group.
        block_size: tokens in a block of the first group.
    """

    layout: Layout | None
    bytes_per_block: int
    block_size: int


def cache_of_model(model: str) -> ModelCache:
    """Return the KV cache of a model, in the type of its configuration.

    Args:
        model: a folder with a config.json, or a name on the Hugging Face hub.

    Raises:
        ValueError: there is none, or something in it is not understood here; the
            message names it.
    """
    config = _config_of(_folder_of(model), "")
    try:
        groups = _groups(config)
    except _NotUnderstoodError as error:
        raise ValueError(f"{model}: {error}") from error
    layout = _as_layout(groups)
    is_plain = len(layout.groups) == 1 and layout.groups[0].kind == "full"
    return ModelCache(
        None if is_plain else layout,
        _bytes_per_block(config, [group for group, _ in groups]),
        layout.groups[0].block_size,
    )


def _folder_of(model: str) -> Path:
    """Return the folder of a model's config.json.

    Raises:
        ValueError: there is none.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        return path
    if path.exists() or path.is_absolute() or model.count("/") != 1:
        raise ValueError(f"{model}: no config.json is in that folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it tells of each attempt
    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: no such folder is here, and the Hugging Face hub gives no "
            "config.json of that name"
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
    return _as_layout(_groups(config))


def _groups(config: VllmConfig) -> list[tuple[KVCacheGroupSpec, Group]]:
    """Return the groups that vLLM makes of a model's layers, and what they keep."""
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
) -> list[tuple[KVCacheGroupSpec, Group]]:
    """Return the groups that vLLM puts layers into, and what they keep.

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
        # MLA's heads read one vector.
        heads = 1 if config.model_config.use_mla else sizes.total_num_kv_heads
        specs[name] = named[name].spec(heads * sizes.head_size)
    return [
        (
            group,
            replace(
                named[group.layer_names[0]], block_size=group.kv_cache_spec.block_size
            ),
        )
        for group in get_kv_cache_groups(config, specs)
    ]


def _as_layout(groups: Sequence[tuple[KVCacheGroupSpec, Group]]) -> Layout:
    return Layout(tuple(group for _, group in groups))


def _bytes_per_block(config: VllmConfig, groups: list[KVCacheGroupSpec]) -> int:
    """Return the bytes of a block, by which vLLM divides memory.

    A group's specs hold keys and values of float32: see ``Group.spec``.
    """
    probe = 1 << 50
    made = get_kv_cache_config_from_groups(config, groups, probe)
    # Of so much memory, what is left over does not matter.
    of_floats = round(probe / made.num_blocks)
    of_type = of_floats * get_dtype_size(config.model_config.dtype) // 4
    # MLA keeps one vector for a token, where others keep a key and a value.
    return of_type // 2 if config.model_config.use_mla else of_type
