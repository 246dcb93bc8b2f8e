"""Which requests go on from an answer: they would come later, were answers later."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from vllm_radix.engine.compat import KVCacheBlock, Request
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.policy import WaitingRequest
from vllm_radix.tree.resume import ResumeTree


class FollowUps(ABC):
    """Recognizes requests whose prompt begins with a finished request and its answer.

    The next turn of a conversation and the branches of a search. Others that go on
    from an answer, and are not recognized, count as requests that come by themselves.
    """

    @abstractmethod
    def note_finished(self, request: Request) -> None:
        """Note a request that ends, while it still holds its blocks."""

    @abstractmethod
    def recognizes(self, entry: WaitingRequest, end: int | None) -> bool:
        """Return whether a request that was just looked up is such a one.

        Args:
            entry: the request.
            end: what its cached prefix ends with, if it has one; see
                ``PrefixLookups.end_block``.
        """


class BlockFollowUps(FollowUps):
    """Those whose cached prefix ends with the last full block of an answered request.

    If the answer fills a block.

    Args:
        keys: of the requests.
        held_blocks: returns the blocks that a request holds, by its id.
    """

    def __init__(
        self, keys: RequestKeys, held_blocks: Callable[[str], Sequence[KVCacheBlock]]
    ) -> None:
        self._keys = keys
        self._held_blocks = held_blocks
        # By block id, the blocks of the prefix that ends with it, and the tokens in
        # it: the block may have been given to another prefix since.
        self._last_blocks: dict[int, tuple[int, bytes]] = {}

    def note_finished(self, request: Request) -> None:
        """Note a request that ends, while it still holds its blocks: O(a block)."""
        size, blocks = self._keys.block_size, self._held_blocks(request.request_id)
        full = min(request.num_computed_tokens, request.num_tokens) // size
        if request.num_prompt_tokens < full * size and full <= len(blocks):
            tokens = self._keys.part(request, (full - 1) * size, full * size)
            self._last_blocks[blocks[full - 1].block_id] = full, tokens

    def recognizes(self, entry: WaitingRequest, end: int | None) -> bool:
        """Return whether a request that was just looked up is such a one: O(a block).

        Args:
            entry: the request.
            end: the last block of its cached prefix, if it has one.
        """
        if end is None:
            return False
        known, tokens = self._last_blocks.get(end, (0, b""))
        if known != entry.cached:
            return False
        last = known * len(tokens)
        return entry.key[last - len(tokens) : last] == tokens


class PointFollowUps(FollowUps):
    """Those that go on from the last resume point of an answered request.

    If it lies in the answer. The tree is told of it when the request leaves.

    Args:
        tree: of the resume points.
    """

    def __init__(self, tree: ResumeTree) -> None:
        self._tree = tree

    def note_finished(self, request: Request) -> None:
        """Do nothing: the last point is yet to be added."""

    def recognizes(self, entry: WaitingRequest, end: int | None) -> bool:
        """Return whether a request that was just looked up is such a one: O(1).

        Args:
            entry: the request.
            end: the id of the point that it needs, if there is one.
        """
        return end is not None and self._tree.ends_answer(end, entry.cached)
