"""Scheduling decisions: pure functions of integers, without vLLM."""

from vllm_radix.policy.order import Waiting, needs_order, prefix_order

__all__ = ["Waiting", "needs_order", "prefix_order"]
