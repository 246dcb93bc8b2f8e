"""Which requests go on from an answer: they would come later, were answers later."""

from collections.abc import Sequence

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.policy import WaitingRequest


class FollowUps:
    """Recognizes requests whose prompt begins with a finished request and its answer.

    The next turn of a conversation and the branches of a search: their cached prefix
    ends with the last full block of the request before them, if its answer fills a
    block. Others that go on from an answer, and are not recognized, count as requests
    that come by themselves.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # By block id, the blocks of the prefix that ends with it: an id that has been
        # given to other tokens ends, most likely, a prefix of another length.
        self._last_blocks: dict[int, int] = {}

    def note_finished(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Note a request that ends, while it still holds its blocks: O(1)."""
        known = min(request.num_computed_tokens, request.num_tokens)
        full = known // self._block_size
        if request.num_prompt_tokens < full * self._block_size and full <= len(blocks):
            self._last_blocks[blocks[full - 1].block_id] = full

    def recognizes(self, entry: WaitingRequest, last_block: int | None) -> bool:
        """Return whether a request that was just looked up is such a one: O(1).

        Args:
            entry: the request.
            last_block: the last block of its cached prefix, if it has one.
        """
        if last_block is None:
            return False
        return self._last_blocks.get(last_block) == entry.cached
