"""vLLM's real scheduler without a model, driven on a cost model's clock."""
