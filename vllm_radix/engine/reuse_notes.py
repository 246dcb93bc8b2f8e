"""What the eviction policy is told of requests: what they used, and what they were."""

from collections.abc import Sequence

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.tree import RadixTree, Use

_USE = "_radix_use"
"""Where a request keeps what it was told at its admission."""


class ReuseNotes:
    """Tells a tree whose policy learns of admissions and ends.

    Args:
        tree: the prefix cache.
        keys: the keys of requests in it.
    """

    def __init__(self, tree: RadixTree, keys: RequestKeys) -> None:
        self._tree = tree
        self._keys = keys

    def admit(
        self, request: Request, blocks: Sequence[KVCacheBlock], num_hits: int
    ) -> None:
        """Note that a request uses what was found: O(runs of its path).

        One that was preempted goes on: that is no other use.

        Args:
            request: it is admitted now.
            blocks: all its blocks.
            num_hits: tokens that were found.
        """
        if request.num_preemptions:
            return
        size = self._keys.block_size
        found = num_hits // size
        request.__dict__[_USE] = self._tree.note_use(
            self._keys.key(request, request.num_tokens // size * size),
            self._keys.namespace(request),
            blocks[found - 1].block_id if found else -1,
            found,
        )

    def leave(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Note that a request ends, or is preempted: O(blocks).

        Args:
            request: what it has computed is published.
            blocks: all its blocks, which it still holds.
        """
        use: Use | None = request.__dict__.get(_USE)
        seen = use.seen * self._keys.block_size if use is not None else 0
        self._tree.note_end(
            [block.block_id for block in blocks],
            use,
            request.num_output_tokens,
            max(0, request.num_prompt_tokens - seen),
        )
        if use is not None:
            # It may go on after a preemption: nothing is to be counted twice.
            request.__dict__[_USE] = use._replace(pending=0, returned=())
