"""What a prefix cache does: the interface, and the rules both sides keep.

A cache maps token prefixes to block ids. It decides; it never touches memory:
the pool that owns the blocks tells it what happens to them and does what it
answers.

The life of a block id, as the cache sees it::

              insert                release                    evict
    blank ------------> held <-----------------> idle ------------------> blank
      ^                   |        acquire         |
      |     discard       |                        |
      +-------------------+------------------------+

* Held: a request uses the block. It is never evicted. ``insert`` makes blocks
  held, because the request that computed them still runs.
* Idle: cached, nobody uses it. Evictable once nothing cached lies below it.
* Blank: the cache does not know the id.

Duplicates. Two requests that compute the same prefix at the same time hold two
blocks for one position. Only the first one is found by ``match``; the other is
a *spare*, and takes over when the first one is let go. A duplicate is cached
only while it is held: as soon as a position has one idle and one other block,
the idle one goes blank and is reported to the pool, to be reused at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from vllm_radix.tree.keys import BYTES_PER_TOKEN

Namespace = Hashable


class Match(NamedTuple):
    """A cached prefix: the ids of its blocks, in order."""

    blocks: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Length of the prefix in blocks."""
        return len(self.blocks)


class Stats(NamedTuple):
    """Sizes of a cache; see the life of a block in this module."""

    namespaces: int
    nodes: int
    cached_blocks: int
    idle_blocks: int
    spare_blocks: int


class PrefixCache(ABC):
    """Maps token prefixes to block ids, at the granularity of whole blocks.

    Keys come from ``vllm_radix.tree.encode``. Keys of different namespaces
    never share a block.

    Args:
        block_size: tokens in a block.

    Attributes:
        version: grows with every change of what ``match`` could answer; while it
            stands still, so do all answers.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self.block_bytes = block_size * BYTES_PER_TOKEN
        self.version = 0

    @abstractmethod
    def match(
        self, key: bytes, namespace: Namespace = None, limit: int | None = None
    ) -> Match:
        """Return the longest cached prefix of ``key``; change nothing.

        Args:
            key: the tokens to look for; an incomplete last block is ignored.
            namespace: where to look.
            limit: most blocks to return.
        """

    @abstractmethod
    def insert(
        self,
        key: bytes,
        blocks: Sequence[int],
        namespace: Namespace = None,
        start: int = 0,
    ) -> list[int]:
        """Cache ``blocks[start:]``, which become held.

        Args:
            key: tokens of at least ``len(blocks)`` blocks.
            blocks: ids of all blocks of the prefix, in order.
            namespace: where to put them.
            start: blocks before this one are the caller's own and are not
                inserted; where the path lacks them it gets holes, at which
                ``match`` stops.

        Returns:
            Idle duplicates that went blank.

        Raises:
            ValueError: ``key`` is too short, or a new block is cached already.
        """

    @abstractmethod
    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held. Blank ids and held blocks are left alone."""

    @abstractmethod
    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle, the first one to be evicted first.

        Returns:
            Duplicates that went blank, because another block has their place.
        """

    @abstractmethod
    def evict(self, count: int) -> list[int]:
        """Let go of up to ``count`` idle blocks, in order of eviction.

        Only blocks with nothing cached below them go, one by one. Fewer are
        returned when no more can go.
        """

    @abstractmethod
    def discard(self, block: int) -> bool:
        """Let go of one block at once, held or not.

        What is cached below stays, out of reach until the hole is filled.

        Returns:
            Whether the block was cached.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __contains__(self, block: object) -> bool:
        """Whether a block id is cached, as a spare or not."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return the sizes, O(1)."""

    @abstractmethod
    def check(self) -> None:
        """Verify every invariant, O(everything); dump the cache on failure.

        Raises:
            AssertionError: an invariant is broken.
        """

    def _checked_insert(self, key: bytes, blocks: Sequence[int], start: int) -> None:
        """Refuse arguments of ``insert`` that no caller may pass."""
        if len(key) < len(blocks) * self.block_bytes:
            raise ValueError(
                f"key holds {len(key) // self.block_bytes} whole blocks of "
                f"{self.block_size} tokens, fewer than the {len(blocks)} to insert"
            )
        for index in range(start, len(blocks)):
            if blocks[index] < 0:
                raise ValueError(f"block ids are at least 0, not {blocks[index]}")
            if blocks[index] in self:
                raise ValueError(f"block {blocks[index]} is cached already")
