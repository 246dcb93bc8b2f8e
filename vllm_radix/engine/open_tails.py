"""The last blocks of running requests: cached when somebody can use them.

A running request fills its last block token by token. To cache it anew with each
token would cost every step of every request; here the request is only noted by
the block before, and its tail is published when a look-up ends right there.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

from vllm_radix.engine.compat import KVCacheBlock, Request

_MOST = 8
"""Tails looked at in one look-up: rollouts of one prompt are all behind one block."""


class OpenBlocks:
    """Running requests by the last full block before their open one."""

    def __init__(self) -> None:
        self._after: dict[Hashable, dict[str, Request]] = {}
        self._of: dict[str, tuple[Hashable, Sequence[KVCacheBlock]]] = {}
        # Admitted in this step: their last block may be a copy yet to be made.
        self._new: set[str] = set()

    def __len__(self) -> int:
        return len(self._of)

    def follow(
        self, request: Request, blocks: Sequence[KVCacheBlock], full: int
    ) -> None:
        """Note a request that was admitted.

        Args:
            request: a plain request.
            blocks: its blocks; the list that grows with it.
            full: how many of them are full, or will be after this step.
        """
        self._new.add(request.request_id)
        before: Hashable = blocks[full - 1].block_id if full else None
        self._of[request.request_id] = before, blocks
        self._after.setdefault(before, {})[request.request_id] = request

    def new_step_starts(self) -> None:
        """Note that whoever was admitted has its blocks by now."""
        self._new.clear()

    def move(self, request: Request, block: KVCacheBlock) -> None:
        """Note that ``block`` of a request is full now, O(1)."""
        known = self._of.get(request.request_id)
        if known is not None:
            before, blocks = known
            self._forget(request.request_id, before)
            self._of[request.request_id] = block.block_id, blocks
            self._after.setdefault(block.block_id, {})[request.request_id] = request

    def leave(self, request: Request) -> None:
        """Forget a request that ended or was preempted."""
        known = self._of.pop(request.request_id, None)
        if known is not None:
            self._forget(request.request_id, known[0])

    def _forget(self, request_id: str, before: Hashable) -> None:
        requests = self._after[before]
        del requests[request_id]
        if not requests:
            del self._after[before]

    def any_after(self, before: int | None) -> bool:
        """Whether ``after`` yields anything, O(1)."""
        return before in self._after

    def after(
        self, before: int | None
    ) -> Iterator[tuple[Request, Sequence[KVCacheBlock]]]:
        """Yield requests and their blocks whose open block follows ``before``.

        Args:
            before: a block id; None for requests without a full block.
        """
        requests = self._after.get(before)
        if requests:
            old = (r for r in requests.values() if r.request_id not in self._new)
            for request in tuple(islice(old, _MOST)):
                yield request, self._of[request.request_id][1]
