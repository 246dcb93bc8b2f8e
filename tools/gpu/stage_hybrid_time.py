"""Stage 8: questions about documents on a hybrid model of real shape, timed.

40 questions about 8 documents, all at once, then in arrivals: the load of the study of
hybrid layouts. The model has the shape of a dense Granite 4 of 3 billion parameters, 36
layers of Mamba2 and 4 of full attention, in bf16 with dummy weights. Stock and radix
take turns on the one device, as in stage 4.
"""

from arms import Json, requests_of
from hybrid_toys import toy_folder
from stage import INTERPRET, WORK, main
from stage_ab import Comparison, number, run

SHAPE: Json = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "shared_intermediate_size": 8192,
    "mamba_n_heads": 64,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_chunk_size": 256,
    "max_position_embeddings": 131072,
}
SEEDS = {"documents": 0, "documents 2": 1, "documents 3": 2}
"""Seeds of the load, by its name."""


class HybridComparison(Comparison):
    """Two arms in turns, with a hybrid model."""

    def prepare(self) -> Json:
        """Write the model, make the loads; return the engine's arguments."""
        from vllm_radix_bench.workloads.hybrid_loads import documents, roots_of
        from vllm_radix_bench.workloads.turn import longest_path

        toy = "windows" if INTERPRET else "granite4"
        shape = {} if INTERPRET else SHAPE
        model = toy_folder(WORK / "hybrid", toy, dtype="bfloat16", **shape)
        longest = 0
        for name, seed in SEEDS.items():
            roots, _ = roots_of(documents(seed))
            if INTERPRET:
                del roots[3:]
                for root in roots:
                    root.tokens = root.tokens[560:640] + root.tokens[-10:]
                    root.max_tokens = 2
            self.made[name] = requests_of(roots)
            longest = max(longest, longest_path(roots))
            if INTERPRET:
                break
        engine = {
            "model": model,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "attention_backend": "TRITON_ATTN",
            "skip_tokenizer_init": True,
            "max_num_seqs": number("SEQS", 32, 4),
            "max_num_batched_tokens": number("BUDGET", 2048, 128),
            "max_model_len": longest + 1,
            "gpu_memory_utilization": 0.4,
            # Room for everything; both arms make as many blocks of it.
            "kv_cache_memory_bytes": number("CACHE_MB", 16384, 64) << 20,
            "async_scheduling": number("ASYNC", 1, 1) == 1,
        }
        if INTERPRET:
            engine["block_size"] = 32
            engine["compilation_config"] = {"mode": 0, "custom_ops": ["none"]}
        counts = {name: len(requests) for name, requests in self.made.items()}
        self.result.put("setting", {**engine, "requests": counts})
        return engine


if __name__ == "__main__":
    main(lambda: run(HybridComparison, "8-hybrid-time"))
