"""Grouped attention over vLLM's backends, one module each."""
