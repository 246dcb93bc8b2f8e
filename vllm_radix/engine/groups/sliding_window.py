"""Sliding-window groups: the last tokens before a resume point, and nothing else."""

from typing import Any

from vllm_radix.engine.compat import SlidingWindowManager, SlidingWindowMLASpec
from vllm_radix.engine.groups.base import GroupType
from vllm_radix.tree.resume import Window


class SlidingWindowGroup(GroupType):
    """Layers whose tokens read a window of those before them."""

    manager = SlidingWindowManager

    @classmethod
    def component(cls, manager: Any) -> Window:
        """Return the window, with what vLLM keeps behind it for drafts."""
        width = manager.sliding_window + manager.extra_retained_tokens
        return Window(manager.block_size, width=width)

    @classmethod
    def problem(cls, spec: Any) -> str | None:
        """Return why a group cannot be served, or None."""
        if isinstance(spec, SlidingWindowMLASpec):
            return "MLA (multi-head latent attention) with a window"
        return None
