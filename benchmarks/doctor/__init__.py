"""What keeps radix from starting here: ``vllm-radix doctor``."""
