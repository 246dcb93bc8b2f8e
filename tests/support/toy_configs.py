"""Configurations of the toy models: what kind, and the sizes that are not common."""

VOCABULARY = 49152
COMMON = {
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
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}
# By name: the class of the configuration, the architecture, and the sizes.
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
"""With local layers beside full attention: vLLM's flag makes one group of them."""

HYBRID_TOYS = {
    **TOYS,
    # Larger heads in full attention: its blocks hold half as many tokens.
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 128,
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
        },
    ),
    # Windows alone.
    "mistral_swa": (
        "MistralConfig",
        "MistralForCausalLM",
        {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 128},
    ),
    # Mamba2, and experts.
    "granite4": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            **_MAMBA2,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "position_embedding_type": "nope",
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "hybrid_override_pattern": "M-M*M-",
            "num_hidden_layers": 6,
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 64,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    # Mamba2 and full attention side by side in each layer.
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {"num_hidden_layers": 3, "head_dim": 32, "mamba_d_ssm": 256, **_MAMBA2},
    ),
    # Mamba2 in each layer, full attention before one of them.
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "mamba_d_state": 64,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 64,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [2],
            "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        },
    ),
    # Gated delta rule, and experts; its kernels want bfloat16.
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
        },
    ),
}
"""Served with several KV cache groups, or with one of windows."""
