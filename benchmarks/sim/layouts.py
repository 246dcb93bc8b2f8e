"""KV cache layouts of several groups, as hybrid models have them.

A layout is written as its parts, such as ``full/528+mamba/528x3``:

>>> layout = Layout.parse("full+swa:1024/16x5")
>>> len(layout.groups), str(layout)
(6, 'full+swa:1024/16x5')
>>> str(layout.at(16))
'full/16+swa:1024/16x5'
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import lcm
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

_NEEDS_TOKENS = {"full": "", "swa": "window", "chunked": "attention chunk", "mamba": ""}
"""Kinds of groups, and what the tokens are that a kind needs, if any."""
FORMS = (
    "full, swa:TOKENS (its window), chunked:TOKENS (its attention chunk) and mamba, "
    "each with /BLOCK tokens per block and xCOUNT groups if need be, joined by +"
)
_PART = re.compile(r"([a-z]+)(?::(\d+))?(?:/(\d+))?(?:x(\d+))?", re.ASCII)
_MOST_TOKENS, _MOST_GROUPS = 1_000_000, 64
_HEAD_SIZE = 8
"""Of the attention group with the largest block: nothing computes with it."""


@dataclass(frozen=True)
class Group:
    """Layers that share a table of blocks.

    Attributes:
        kind: full, swa, chunked or mamba.
        tokens: of the window or the attention chunk; 0 where there is none.
        block_size: tokens in a block; 0 for that of the run.
    """

    kind: str
    tokens: int = 0
    block_size: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether stock caches every block of it."""
        return self.kind in ("full", "chunked")

    def spec(self, head_size: int) -> "KVCacheSpec":
        """Return vLLM's spec of the group.

        Args:
            head_size: of one head of float32; a state takes as much as its block's
                tokens would.
        """
        import torch
        from vllm.v1.kv_cache_interface import (
            ChunkedLocalAttentionSpec,
            FullAttentionSpec,
            MambaSpec,
            SlidingWindowSpec,
        )

        sizes: dict[str, Any] = {
            "block_size": self.block_size,
            "num_kv_heads": 1,
            "head_size": head_size,
            "dtype": torch.float32,
        }
        if self.kind == "swa":
            return SlidingWindowSpec(**sizes, sliding_window=self.tokens)
        if self.kind == "chunked":
            return ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=self.tokens)
        full = FullAttentionSpec(**sizes)
        if self.kind == "full":
            return full
        floats = full.page_size_bytes // torch.float32.itemsize
        return MambaSpec(
            block_size=self.block_size,
            shapes=((floats,),),
            dtypes=(torch.float32,),
            mamba_cache_mode="align",
        )

    def __str__(self) -> str:
        tokens = f":{self.tokens}" if self.tokens else ""
        return f"{self.kind}{tokens}" + (f"/{self.block_size}" * bool(self.block_size))


@dataclass(frozen=True)
class Layout:
    """The groups of a KV cache, in vLLM's order: that of their first layers."""

    groups: tuple[Group, ...]

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Return the layout that a text names.

        Raises:
            ValueError: it names none; the message names the part that is wrong.
        """
        groups: list[Group] = []
        for part in text.split("+"):
            groups += _groups(part, text)
        if len(groups) > _MOST_GROUPS:
            raise ValueError(
                f"layout {text!r} has {len(groups)} groups; allowed: up to "
                f"{_MOST_GROUPS}"
            )
        return cls(tuple(groups))

    def at(self, block_size: int) -> "Layout":
        """Return the layout with a block size for the groups that name none.

        Raises:
            ValueError: vLLM has no cache with these sizes of blocks.
        """
        groups = self._sized(block_size)
        sizes = sorted({group.block_size for group in groups})
        for kind in ("mamba", "chunked"):
            if len(sizes) > 1 and any(group.kind == kind for group in groups):
                raise ValueError(
                    f"layout '{self}' has blocks of {' and '.join(map(str, sizes))} "
                    f"tokens; allowed with {kind}: the same /BLOCK in all parts, for "
                    "vLLM has no others there"
                )
        return Layout(groups)

    def _sized(self, block_size: int) -> tuple[Group, ...]:
        return tuple(
            replace(g, block_size=g.block_size or block_size) for g in self.groups
        )

    @property
    def dense_groups(self) -> int:
        """Number of groups whose every block is kept; 1 if there is none."""
        return sum(group.is_dense for group in self.groups) or 1

    def dense_block_size(self, block_size: int) -> int:
        """Return the tokens in a block of those.

        Args:
            block_size: of groups that name none.
        """
        first = max(self.groups, key=lambda group: group.is_dense)
        return first.block_size or block_size

    def blocks_to_keep(self, tokens: int) -> int:
        """Return the blocks that keep a path so that a request can go on at its end.

        Args:
            tokens: of the path; every group names the tokens of its blocks.
        """

        def blocks(group: Group) -> int:
            if group.kind == "mamba":
                return 1
            reach = group.tokens if group.kind == "swa" else tokens
            return -(-min(reach, tokens) // group.block_size)

        return sum(map(blocks, self.groups))

    def specs(self, block_size: int) -> "list[KVCacheSpec]":
        """Return vLLM's specs, one a group; their blocks have the same bytes.

        Also of layouts that ``at`` refuses, which vLLM's scheduler serves.

        Args:
            block_size: of groups that name none.
        """
        groups = self._sized(block_size)
        whole = lcm(*(group.block_size for group in groups))
        # Smaller blocks have larger heads, and so all pages are alike.
        return [group.spec(_HEAD_SIZE * whole // group.block_size) for group in groups]

    def __str__(self) -> str:
        counts = [(group, len(list(same))) for group, same in groupby(self.groups)]
        return "+".join(f"{group}" + f"x{n}" * (n > 1) for group, n in counts)


def _groups(part: str, text: str) -> Sequence[Group]:
    """Return the groups of a part of a layout's text.

    Raises:
        ValueError: it is wrong.
    """
    match = _PART.fullmatch(part)
    kind, *numbers = match.groups() if match else ("", None, None, None)
    tokens, block_size, count = (None if n is None else int(n) for n in numbers)
    wanted = _NEEDS_TOKENS.get(kind)
    if wanted is None:
        problem = "is no part of a layout"
    elif wanted and tokens is None:
        problem = f"names no {wanted}"
    elif not wanted and tokens is not None:
        problem = f"has tokens, and {kind} takes none"
    elif not all(n is None or 1 <= n <= _MOST_TOKENS for n in (tokens, block_size)):
        problem = f"has a number that is not from 1 to {_MOST_TOKENS}"
    elif count is not None and not 1 <= count <= _MOST_GROUPS:
        problem = f"has a count that is not from 1 to {_MOST_GROUPS}"
    else:
        return [Group(kind, tokens or 0, block_size or 0)] * (count or 1)
    raise ValueError(f"layout {text!r}: {part!r} {problem}; allowed: {FORMS}")
