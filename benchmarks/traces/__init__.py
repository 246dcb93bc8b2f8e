"""Traces: recorded requests, read into turns to be replayed."""
