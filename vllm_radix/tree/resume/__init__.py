"""The prefix cache of models that cannot go on from just any cached token.

Layers with a sliding window, with chunks, or with a state keep less than every
token's KV: a request can go on only where each of them has what it needs.
"""

from vllm_radix.tree.resume.components import Chunk, Component, Dense, State, Window
from vllm_radix.tree.resume.point import (
    Resume,
    ResumePoint,
    ResumeProbe,
    ResumeStats,
)
from vllm_radix.tree.resume.resume_tree import ResumeTree

__all__ = [
    "Chunk",
    "Component",
    "Dense",
    "Resume",
    "ResumePoint",
    "ResumeProbe",
    "ResumeStats",
    "ResumeTree",
    "State",
    "Window",
]
