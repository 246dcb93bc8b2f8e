"""Attention that reads a shared prefix once per group of requests."""
