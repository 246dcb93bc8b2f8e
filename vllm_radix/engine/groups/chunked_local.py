"""Chunked local attention: a token reads back to where its chunk begins."""

from typing import Any

from vllm_radix.engine.compat import ChunkedLocalAttentionManager
from vllm_radix.engine.groups.base import GroupType
from vllm_radix.tree.resume import Chunk


class ChunkedLocalGroup(GroupType):
    """Layers whose tokens read those of their chunk."""

    manager = ChunkedLocalAttentionManager

    @classmethod
    def component(cls, manager: Any) -> Chunk:
        """Return the chunk."""
        return Chunk(manager.block_size, chunk=manager.attention_chunk_size)
