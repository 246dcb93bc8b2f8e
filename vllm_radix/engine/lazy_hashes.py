"""Block hashes that nobody computes until somebody reads them.

vLLM hashes every block of every request for its prefix cache. The radix tree
needs none of it, but KV events, KV connectors and others may: they read
``request.block_hashes``, which is a sequence of this kind here.
"""

from collections.abc import Callable, Iterable, MutableSequence
from typing import Any, overload
from weakref import ref

from vllm_radix.engine.compat import BlockHash, Request

Hasher = Callable[[Request], list[BlockHash]]


class LazyHasher:
    """Stands in for a request's block hasher: gives it hashes on demand.

    Args:
        hasher: vLLM's; returns the hashes that follow ``request.block_hashes``.
        block_size: tokens in a block.
        num_lookahead_tokens: after each block, which its hash covers, too.
    """

    def __init__(
        self, hasher: Hasher, block_size: int, num_lookahead_tokens: int = 0
    ) -> None:
        self._hasher = hasher
        self._block_size = block_size
        self._num_lookahead_tokens = num_lookahead_tokens

    def __call__(self, request: Request) -> list[BlockHash]:
        """Give a request its lazy hashes, on its first call; compute none."""
        if not isinstance(request.block_hashes, LazyHashes):
            known = list(request.block_hashes)
            request.block_hashes = LazyHashes(
                request,
                self._hasher,
                self._block_size,
                known,
                self._num_lookahead_tokens,
            )
            # Nothing is left to do as tokens come: the length follows them.
            request._block_hasher = None
        return []


class LazyHashes(MutableSequence[BlockHash]):
    """The hashes of a request's full blocks, computed as far as they are read.

    Its length is known without hashing. It refers to the request weakly: vLLM
    avoids cycles, so that requests are freed at once.

    Args:
        request: whose hashes.
        hasher: vLLM's.
        block_size: tokens in a block.
        known: the first hashes, if computed already; kept.
        num_lookahead_tokens: after each block, which its hash covers, too.
    """

    def __init__(
        self,
        request: Request,
        hasher: Hasher,
        block_size: int,
        known: list[BlockHash],
        num_lookahead_tokens: int = 0,
    ) -> None:
        self._request = ref(request)
        self._hasher = hasher
        self._block_size = block_size
        self._known = known
        self._num_lookahead_tokens = num_lookahead_tokens

    def __len__(self) -> int:
        request = self._request()
        if request is None:
            return len(self._known)
        covered = request.num_tokens - self._num_lookahead_tokens
        return max(len(self._known), covered // self._block_size)

    @property
    def num_computed(self) -> int:
        """How many hashes have been computed."""
        return len(self._known)

    def _all(self) -> list[BlockHash]:
        request = self._request()
        if request is not None and len(self._known) < len(self):
            # The hasher goes on from what the request has, and reads it.
            request.block_hashes = self._known
            try:
                self._known.extend(self._hasher(request))
            finally:
                request.block_hashes = self
        return self._known

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...

    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self._all()[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        self._all()[index] = value

    def __delitem__(self, index: int | slice) -> None:
        # A streaming session drops the hashes of tokens that it has dropped
        # already, so they must not be computed first.
        del self._known[index]

    def clear(self) -> None:
        """Drop all hashes; they are computed again where they are read."""
        self._known.clear()

    def insert(self, index: int, value: BlockHash) -> None:
        """Insert a hash."""
        self._all().insert(index, value)

    def extend(self, values: Iterable[BlockHash]) -> None:
        """Append hashes: vLLM does so with what its hasher returns."""
        values = list(values)
        if values:
            self._all().extend(values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LazyHashes):
            return self._all() == other._all()
        return isinstance(other, list) and self._all() == other

    __hash__ = None  # type: ignore[assignment]
