"""Which tokens came after each cached block, where a draft model's KV depends on them.

The last position of a block in a draft model's cache is computed from the tokens after
it. Where vLLM's hashes cover those (``num_hash_lookahead_tokens``), a block that ends
a hit is found only by requests that go on with the same ones::

    cached   [ a b c d ] e      hit by  a b c d e ...     and not by  a b c d x ...

The tree keeps one block of each content, vLLM one for each continuation. A request that
computed a twin of a block adds its continuation to the tree's: hits are vLLM's, and a
draft after that block may be a little worse. Answers never depend on drafts.
"""

from collections.abc import Hashable, Sequence

from vllm_radix.engine.compat import (
    KVCacheBlock,
    Request,
    generate_block_hash_extra_keys,
)
from vllm_radix.engine.request_keys import RequestKeys

MAX_CONTINUATIONS = 256
"""Of a block, that are remembered."""


class BlockLookahead:
    """Remembers what came after each block when it, or a twin of it, was cached.

    What came is told as in the keys of requests: where salts share a public prefix,
    what came after it is another thing for each salt.

    Args:
        keys: of the requests.
        num_tokens: after a block, which count.
    """

    def __init__(self, keys: RequestKeys, num_tokens: int) -> None:
        self._keys = keys
        self._size = keys.block_size
        self._num_tokens = num_tokens
        # In order: what came first is forgotten first.
        self._after: dict[int, dict[Hashable, None]] = {}

    def note(
        self, request: Request, new: Sequence[int], start: int, kept: Sequence[int]
    ) -> None:
        """Note blocks that a request caches: O(new blocks).

        Args:
            request: the request.
            new: ids of its blocks from ``start`` on.
            start: how many of them the tree knows.
            kept: ids of the blocks with the same tokens that are cached, from there on.
        """
        for index, block_id in enumerate(new):
            after = self._of(request, (start + index + 1) * self._size)
            seen: dict[Hashable, None] = {}
            if index < len(kept):
                # The tree goes on with one of the two.
                seen = self._after.setdefault(kept[index], seen)
            seen[after] = None
            if len(seen) > MAX_CONTINUATIONS:
                del seen[next(iter(seen))]
            self._after[block_id] = seen

    def trim(self, request: Request, blocks: list[KVCacheBlock]) -> None:
        """Take off the blocks at the end of a hit that other tokens came after."""
        while blocks:
            after = self._of(request, len(blocks) * self._size)
            if after in self._after.get(blocks[-1].block_id, ()):
                return
            blocks.pop()

    def _of(self, request: Request, start: int) -> Hashable:
        """Return what tells the tokens from ``start`` on; fewer if it has no more."""
        end = start + self._num_tokens
        extra = None
        if request.mm_features or request.prompt_embeds is not None:
            extra, _ = generate_block_hash_extra_keys(request, start, end, 0)
        return self._keys.part(request, start, end), extra
