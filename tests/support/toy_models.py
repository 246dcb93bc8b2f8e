"""Toy models of kinds that mix local and full attention, with weights that matter.

A folder holds a configuration and a tokenizer; weights are made when an engine loads
it, the same ones in each. vLLM's own dummy weights lie within 0.001: with them no
layer has a say, and a wrong block would not show.
"""

import shutil
from pathlib import Path

import torch
import transformers

VOCABULARY = 49152
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
TOYS = {
    # Two layers with a window of 128 for each with full attention.
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 128,
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
        },
    ),
    # Every other layer, with sinks and experts.
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # Three of four layers attend within chunks of 256.
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 256,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
}


def make_toy(name, folder, tokenizer):
    """Write a toy's folder; return its path.

    Args:
        name: of ``TOYS``.
        folder: where to write it.
        tokenizer: a model's folder whose tokenizer it gets.
    """
    kind, architecture, sizes = TOYS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **sizes})
    config.architectures = [architecture]
    config.dtype = "float32"
    folder = Path(folder) / name
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / file, folder)
    return str(folder)


def give_weights():
    """Make vLLM's dummy loader give weights with which every layer has a say."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    # Before the CPU packs them: afterwards it would be too late.
    DummyModelLoader.load_weights = lambda loader, model, config: fill(model)


def fill(model):
    """Fill a model's parameters at random, the same way each time."""
    random = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        if not weights.is_floating_point():
            continue
        values = torch.randn(weights.shape, generator=random)
        if weights.dim() == 1:
            values = torch.ones_like(values) if "norm" in name else values * 0.02
        elif "embed" in name:
            values *= 0.02  # the layers decide, not the last token
        else:
            values *= weights.shape[-1] ** -0.5
        if "qkv" in name:
            values *= 2.5  # few keys get most of the attention
        with torch.no_grad():
            weights.copy_(values.to(weights.dtype))
