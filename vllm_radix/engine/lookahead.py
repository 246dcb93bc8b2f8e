"""Which tokens came after each cached block, where a draft model's KV depends on them.

The last position of a block in a draft model's cache is computed from the tokens after
it. Where vLLM's hashes cover those (``num_hash_lookahead_tokens``), a block that ends
a hit is found only by requests that go on with the same ones::

    cached   [ a b c d ] e      hit by  a b c d e ...     and not by  a b c d x ...

Inside a hit they are not looked at: the tree keeps one block of each content, and one
draft is a little worse after another continuation, no answer is.
"""

from collections.abc import Hashable, Iterable

from vllm_radix.engine.compat import (
    KVCacheBlock,
    Request,
    generate_block_hash_extra_keys,
)


class BlockLookahead:
    """Remembers what came after each block when it was cached.

    Args:
        block_size: tokens in a block.
        num_tokens: after a block, which count.
    """

    def __init__(self, block_size: int, num_tokens: int) -> None:
        self._size = block_size
        self._num_tokens = num_tokens
        self._after: dict[int, Hashable] = {}

    def note(self, request: Request, block_ids: Iterable[int], first: int) -> None:
        """Note blocks that a request caches: O(blocks).

        Args:
            request: the request.
            block_ids: of its blocks that are new.
            first: the index of the first of them.
        """
        for index, block_id in enumerate(block_ids, first):
            self._after[block_id] = self._of(request, (index + 1) * self._size)

    def trim(self, request: Request, blocks: list[KVCacheBlock]) -> None:
        """Take off the blocks at the end of a hit that other tokens came after."""
        while blocks:
            after = self._of(request, len(blocks) * self._size)
            if self._after.get(blocks[-1].block_id) == after:
                return
            blocks.pop()

    def _of(self, request: Request, start: int) -> Hashable:
        """Return what tells the tokens from ``start`` on; fewer if it has no more."""
        end = start + self._num_tokens
        extra = None
        if request.mm_features or request.prompt_embeds is not None:
            extra, _ = generate_block_hash_extra_keys(request, start, end, 0)
        return tuple(request.all_token_ids[start:end]), extra
