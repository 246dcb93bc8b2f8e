"""Which requests go on from an answer: they would come later, were answers later."""

from collections.abc import Sequence

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.policy import WaitingRequest
from vllm_radix.tree import encode


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
        # By block id, the blocks of the prefix that ends with it, and the tokens in
        # it: the block may have been given to another prefix since.
        self._last_blocks: dict[int, tuple[int, bytes]] = {}

    def note_finished(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Note a request that ends, while it still holds its blocks: O(a block)."""
        size = self._block_size
        full = min(request.num_computed_tokens, request.num_tokens) // size
        if request.num_prompt_tokens < full * size and full <= len(blocks):
            tokens = request.all_token_ids[(full - 1) * size : full * size]
            self._last_blocks[blocks[full - 1].block_id] = full, encode(tokens)

    def recognizes(self, entry: WaitingRequest, last_block: int | None) -> bool:
        """Return whether a request that was just looked up is such a one: O(a block).

        Args:
            entry: the request.
            last_block: the last block of its cached prefix, if it has one.
        """
        if last_block is None:
            return False
        known, tokens = self._last_blocks.get(last_block, (0, b""))
        if known != entry.cached:
            return False
        end = known * len(tokens)
        return entry.key[end - len(tokens) : end] == tokens
