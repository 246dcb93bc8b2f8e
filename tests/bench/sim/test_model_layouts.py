"""Layouts from model folders: the groups that vLLM made of the same toys."""

import json

import pytest

from support.toy_models import TOYS, make_toy
from vllm_radix_bench.sim.model_layouts import cache_of_model, layout_of_model

OF_TOYS = {
    "gemma3": "swa:128/16x2+full/16",
    "gpt_oss": "swa:128/16+full/16",
    "llama4": "chunked:256/16x3+full/16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 64,
}
GEMMA4 = {
    **LLAMA,
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 128,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "num_kv_shared_layers": 0,
}
STATE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}
GRANITE4 = {
    **LLAMA,
    **STATE,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "dtype": "float32",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 128,
    "mamba_expand": 2,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
}


def folder_of(path, config):
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_every_toy_has_a_layout_here():
    assert set(OF_TOYS) == set(TOYS)


@pytest.mark.parametrize("name", OF_TOYS)
def test_local_layers_are_grouped_as_vllm_does(name, tmp_path, smollm2):
    folder = tmp_path / make_toy(name, tmp_path, smollm2)
    assert str(layout_of_model(folder)) == OF_TOYS[name]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LLAMA, "full/16"),
        (MISTRAL, "swa:64/16"),
        # Blocks of smaller heads hold more tokens.
        (GEMMA4, "swa:128/32x2+full/16"),
        # (3 * 384 + 8 * 32 * 64) * 4 bytes of state; 2 * 2 * 32 * 4 a token: 137.
        (GRANITE4, "mamba/144x3+full/144"),
    ],
)
def test_sizes_come_from_the_configuration(config, text, tmp_path):
    assert str(layout_of_model(folder_of(tmp_path, config))) == text


def test_what_is_not_understood_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json is in that folder"):
        layout_of_model(tmp_path)
    folder_of(tmp_path, {**LLAMA, "block_configs": [1]})
    with pytest.raises(ValueError, match="its field block_configs is not understood"):
        layout_of_model(tmp_path)
    folder_of(tmp_path, {**LLAMA, "layers_block_type": ["attention", "echo"]})
    with pytest.raises(ValueError, match="its layers_block_type has 'echo', and under"):
        layout_of_model(tmp_path)
    types = {"layer_types": ["full_attention", "chunked_attention"]}
    folder_of(tmp_path, {**LLAMA, **types})
    with pytest.raises(ValueError, match="no field tells how many tokens"):
        layout_of_model(tmp_path)
    folder_of(tmp_path, {"model_type": "no such model", "architectures": ["Nothing"]})
    with pytest.raises(ValueError, match=r"vLLM does not take it: .*no such model"):
        layout_of_model(tmp_path)


MLA = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.mark.parametrize(
    ("config", "layout", "size"),
    [
        # Layers of a group, key and value, heads, head size, bytes, tokens in a block.
        (LLAMA, None, 2 * 2 * 1 * 32 * 2 * 16),
        (
            {**LLAMA, "num_key_value_heads": 1, "head_dim": 16},
            None,
            2 * 2 * 16 * 2 * 16,
        ),
        (MISTRAL, "swa:64/16", 2 * 2 * 8 * 32 * 2 * 16),
        (GEMMA4, "swa:128/32x2+full/16", 2 * 2 * 2 * 32 * 2 * 32),
        (GRANITE4, "mamba/144x3+full/144", 1 * 2 * 2 * 32 * 2 * 144),
        # One vector of 64 + 16 for keys and values.
        (MLA, None, 2 * 1 * (64 + 16) * 2 * 16),
    ],
    ids=["llama", "head_dim", "mistral", "gemma4", "granite4", "mla"],
)
def test_the_bytes_of_a_block_are_those_of_a_server(config, layout, size, tmp_path):
    found = cache_of_model(str(folder_of(tmp_path, config)))
    assert (found.layout and str(found.layout), found.bytes_per_block) == (layout, size)


def test_a_cache_of_a_model_that_is_not_understood_is_refused(tmp_path):
    folder = folder_of(tmp_path, {**LLAMA, "block_configs": [1]})
    with pytest.raises(ValueError, match=f"^{folder}: its field block_configs is not"):
        cache_of_model(str(folder))
    for name in ("no/such", "x/y/z", str(tmp_path / "gone")):
        with pytest.raises(ValueError, match=f"^{name}: no "):
            cache_of_model(name)
