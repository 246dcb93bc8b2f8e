"""The replay: requests through the real scheduler, without a model."""
