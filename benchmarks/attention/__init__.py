"""Attention kernels on one layer: timed, counted, and predicted."""
