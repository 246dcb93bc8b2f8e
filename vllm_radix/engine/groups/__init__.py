"""Managers of vLLM's KV cache groups, one module per type of group."""
