"""The adapter: the only part, with plugin and patches, that imports vLLM."""
