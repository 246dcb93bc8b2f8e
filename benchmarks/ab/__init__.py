"""The A/B: stock vLLM and radix, on real engines."""
