"""The interface of a prefix cache, and the rules that a cache and its pool keep.

A cache maps token prefixes to block ids. It decides; it never touches memory: the
pool that owns the blocks tells the cache what happens to them, and does what the
cache answers.

The life of a block id, as the cache sees it::

                 insert                release                  evict
    uncached ------------> held <---------------> idle ----------------> uncached
      ^                      |       acquire        |
      |       discard        |                      |
      +----------------------+----------------------+

* Held: a request uses the block. It is never evicted. ``insert`` makes blocks held,
  because the request that computed them still runs.
* Idle: cached, and no request uses it. Evictable once nothing cached lies below it.
* Uncached: the cache does not know the id.

Duplicates. Two requests that compute the same prefix at the same time hold two blocks
for one position. ``match`` finds the first one only; the other is a *duplicate*, and
takes over when the first one is let go. It is cached only while it is held: as soon as
a position has one idle and one other block, the idle one becomes uncached and is
reported to the pool, to be reused at once.

Partial blocks. The last block of a request is seldom full. ``insert_partial`` caches
it behind the whole blocks before it, for hits that end inside a block::

    key      | whole block | whole block | 5 of 16 tokens |
    blocks   |      7      |      3      |       9        |

Such a hit shares no memory: the request copies the block, because the tokens after the
hit are its own. Any block serves as the source of such a copy, as far as its tokens
go; a partial block serves nothing else. It is not cached where another block already
holds all its tokens. Most partial blocks are never asked for, so an idle one goes
before any full block until ``note_hit`` says that a request has copied from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from vllm_radix.tree.token_keys import BYTES_PER_TOKEN

Namespace = Hashable

ALL_WRITTEN: Mapping[int, int] = MappingProxyType({})
"""For ``PrefixCache.match``: all blocks are written to their end."""


class PartialMatch(NamedTuple):
    """A block whose first tokens continue a match.

    Attributes:
        block: its id.
        num_tokens: how many of its tokens match: at least 1, less than a block.
        num_valid: how many tokens it holds.
    """

    block: int
    num_tokens: int
    num_valid: int


class Match(NamedTuple):
    """A cached prefix.

    Attributes:
        blocks: the ids of its whole blocks, in order.
        partial: where it goes on inside one more block, if asked for.
    """

    blocks: tuple[int, ...]
    partial: PartialMatch | None = None

    @property
    def num_blocks(self) -> int:
        """Length of the prefix in whole blocks."""
        return len(self.blocks)


class Stats(NamedTuple):
    """Sizes of a cache; see the life of a block in this module.

    Attributes:
        namespaces: roots.
        nodes: edges.
        cached_blocks: blocks that can be found, partial ones included.
        idle_blocks: those of them that no request uses.
        duplicate_blocks: duplicates, not among the cached.
        partial_blocks: partial ones among the cached.
        unhit_blocks: partial ones that are idle and were never hit.
    """

    namespaces: int
    nodes: int
    cached_blocks: int
    idle_blocks: int
    duplicate_blocks: int
    partial_blocks: int
    unhit_blocks: int


class PrefixCache(ABC):
    """Maps token prefixes to block ids.

    Keys come from ``vllm_radix.tree.encode``. Keys of different namespaces
    never share a block.

    Args:
        block_size: tokens in a block.

    Attributes:
        version: grows with every change of what ``match`` could answer; while it
            stays the same, so do all answers.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size = block_size
        self.block_bytes = block_size * BYTES_PER_TOKEN
        self.version = 0

    @abstractmethod
    def match(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        *,
        partial: bool = False,
        written: Mapping[int, int] = ALL_WRITTEN,
    ) -> Match:
        """Return the longest cached prefix of ``key``; change nothing.

        Args:
            key: the tokens to look for.
            namespace: where to look.
            limit: most tokens to match.
            partial: look for a match that goes on inside a block, too. Without
                it an incomplete last block of the key is ignored.
            written: blocks that are not written to their end, and how many of
                their tokens are; no more than those match as a part.
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

        ``blocks[start]`` may be cached as a partial block: it is full now.

        Args:
            key: tokens of at least ``len(blocks)`` blocks.
            blocks: ids of all blocks of the prefix, in order.
            namespace: where to put them.
            start: blocks before this one are the caller's own and are not
                inserted; where the path lacks them it gets holes, at which
                ``match`` stops.

        Returns:
            Idle blocks that became uncached: duplicates of what was inserted, and
            partial blocks whose tokens it continues.

        Raises:
            ValueError: ``key`` is too short, or a new block is cached already.
        """

    @abstractmethod
    def insert_partial(
        self, key: bytes, blocks: Sequence[int], namespace: Namespace = None
    ) -> tuple[bool, list[int]]:
        """Cache the partial block ``blocks[-1]``, which becomes held.

        It may be cached as a partial block already: it has more tokens now.

        Args:
            key: tokens of ``len(blocks) - 1`` whole blocks, and of the part.
            blocks: ids of all blocks of the prefix, in order.
            namespace: where to put it.

        Returns:
            Whether it is cached: not when the blocks before it are not cached, or
            another block holds all its tokens. And idle partial blocks that became
            uncached, because this one continues their tokens.

        Raises:
            ValueError: ``key`` does not end inside the last block, or that block
                is cached elsewhere.
        """

    @abstractmethod
    def note_hit(self, block: int) -> None:
        """Note that a request copies from a block.

        From its next release on, a partial block is evicted in the order of all.
        """

    @abstractmethod
    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held. Uncached ids and held blocks are left alone."""

    @abstractmethod
    def release(self, blocks: Iterable[int]) -> list[int]:
        """Make held blocks idle, the first one to be evicted first.

        Returns:
            Blocks that became uncached, because another block has their place.
        """

    @abstractmethod
    def pin(self, block: int) -> None:
        """Evict a block last, and so the blocks before it on its path.

        A bias, not a lock: pinned blocks go when nothing else is left, in their own
        order. Pins are counted, and gone when the block leaves the cache. The ids of
        uncached blocks, duplicates and partial blocks are ignored.
        """

    @abstractmethod
    def unpin(self, block: int) -> None:
        """Take back one ``pin`` of a block; without one it changes nothing."""

    @property
    @abstractmethod
    def num_pinned_idle(self) -> int:
        """Number of idle blocks that are pinned, or lie before a pinned one."""

    @abstractmethod
    def evict(self, count: int) -> list[int]:
        """Evict up to ``count`` idle blocks; return them in order of eviction.

        Only blocks with nothing cached below them go, one by one. Fewer are
        returned when no more can go.
        """

    @abstractmethod
    def discard(self, block: int) -> bool:
        """Remove one block at once, held or not.

        What is cached below it stays, out of reach until the hole is filled.

        Returns:
            Whether the block was cached.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __contains__(self, block: object) -> bool:
        """Whether a block id is cached, as a duplicate or not."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return the sizes, O(1)."""

    @abstractmethod
    def check(self) -> None:
        """Verify every invariant, O(everything); dump the cache on failure.

        Raises:
            AssertionError: an invariant is broken.
        """

    def _refuse(self, block: int) -> None:
        """Refuse an id that cannot be inserted."""
        if block < 0:
            raise ValueError(f"block ids are at least 0, not {block}")
        if block in self:
            raise ValueError(f"block {block} is cached already")

    def _refuse_key(self, key: bytes, blocks: int) -> None:
        """Refuse a key too short for so many blocks."""
        if len(key) < blocks * self.block_bytes:
            raise ValueError(
                f"key holds {len(key) // self.block_bytes} whole blocks of "
                f"{self.block_size} tokens, fewer than the {blocks} to insert"
            )

    def _refuse_partial(self, key: bytes, blocks: int) -> None:
        """Refuse a key that does not end inside the last block."""
        whole, part = divmod(len(key), self.block_bytes)
        if whole != blocks - 1 or not part:
            raise ValueError(
                f"key holds {len(key) // BYTES_PER_TOKEN} tokens, which do not end "
                f"inside the last of {blocks} blocks of {self.block_size}"
            )

    @staticmethod
    def _refuse_other(
        known: bytes | bytearray, tokens: bytes | bytearray, block: int
    ) -> None:
        """Refuse tokens that do not continue those of a partial block."""
        if not tokens.startswith(known):
            raise ValueError(f"block {block} is cached already, with other tokens")
