"""Workloads of a size: as many groups as fill a multiple of a cache.

All roots are sent at once, in order.
"""

import random

from vllm_radix_bench.workloads.builders import BUILDERS, Writer
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn, Workload

REFERENCE_CACHE = 8192
"""Tokens of the cache for which the builders' lengths were chosen; they scale."""


def _interleave(groups: list[list[Turn]]) -> list[Turn]:
    """Return the first of each group, then the second of each, and so on."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


class BlockCounter:
    """Counts the distinct blocks of all prompts and answers added to it.

    An answer is counted as shared with nothing but its own continuations.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        # (block before, tokens) of each distinct block, to its number.
        self._blocks: dict[tuple[int, tuple[int, ...]], int] = {}
        self._answers = 0

    def add(self, roots: list[Turn]) -> int:
        """Add trees of turns; return the distinct blocks so far. O(tokens)."""
        stack: list[tuple[Turn, int, list[int]]] = [(turn, 0, []) for turn in roots]
        while stack:
            turn, block, rest = stack.pop()
            first = self._answers + 1
            self._answers += turn.max_tokens
            answer = [-i for i in range(first, first + turn.max_tokens)]
            if turn.whole:
                block, rest = 0, []
            rest = [*rest, *turn.tokens, *answer]
            whole = len(rest) // self._size * self._size
            for at in range(0, whole, self._size):
                key = block, tuple(rest[at : at + self._size])
                block = self._blocks.setdefault(key, len(self._blocks) + 1)
            stack.extend((child, block, rest[whole:]) for child in turn.children)
        return len(self._blocks)


def build(
    name: str,
    encode: Encode,
    *,
    num_blocks: int,
    block_size: int,
    pressure: float,
    seed: int,
    max_tokens: int | None = None,
    stretch: float = 1.0,
    scale: float | None = None,
) -> Workload:
    """Build a workload whose working set is ``pressure`` times the cache.

    Groups (banks, users, tasks, documents) are added until the next one would
    go further past the target than it falls short without it.

    Args:
        name: a key of ``BUILDERS``.
        encode: text to token ids, without special tokens.
        num_blocks: blocks of the cache.
        block_size: tokens in a block.
        pressure: working set over cache; the result tells what was reached.
        seed: of all choices.
        max_tokens: generate at most this many per turn.
        stretch: factor on lengths; longer prompts make fewer requests.
        scale: factor on the builders' lengths, before ``stretch``; None for one that
            grows with the cache.
    """
    target = pressure * num_blocks
    if scale is None:
        scale = num_blocks * block_size / REFERENCE_CACHE
    scale *= stretch
    write = Writer(random.Random(f"{name} {seed}"), encode, scale)
    counter = BlockCounter(block_size)
    groups: list[list[Turn]] = []
    reached = 0
    while reached < target:
        group = BUILDERS[name](write, len(groups))
        for turn in Workload(name, 0, group).turns():
            turn.max_tokens = min(turn.max_tokens, max_tokens or turn.max_tokens)
        before, reached = reached, counter.add(group)
        if groups and reached - target > target - before:
            reached = before
            break
        groups.append(group)
    return Workload(name, reached / num_blocks, _interleave(groups))
