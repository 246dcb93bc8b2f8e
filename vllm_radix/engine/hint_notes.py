"""Follows the hints of requests: says in the tree what goes first, and what stays."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vllm_radix.engine.compat import KVCacheBlock, Request, logger
from vllm_radix.engine.hints import MOST_PRIORITY, HintError, Hints, parse_hints
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.tenants import Tenants
from vllm_radix.engine.wishes import KeepingTree, Wishes
from vllm_radix.tree import Namespace, RadixTree

PRIORITY_SECONDS = 300.0
"""How long a priority holds after its request, without ``radix_keep_for``."""

MARGIN = 0.5
"""By how much a session may come later than expected, as a share of that time."""

MIN_MARGIN = 5.0
"""By how many seconds it may, at least."""

MOST_ENDS = 4096
"""Responses of which it is known where they ended, for ``radix_replaces``."""

MOST_SAMPLES = 16
"""Answers of one response of which that is known."""

_HINTS = "_radix_hints"
"""Where a request keeps its hints, once they are read."""

MOST_CHARACTERS = 256
"""Of an id, and of a tenant's name: of longer ones, which clients choose, no end is
remembered."""

_ID = re.compile(r"(?:\d+_)?(.+?)(?:-[0-9a-f]{8})?", re.DOTALL)
"""vLLM puts the number of a sample before a request's id, and 8 letters after it."""


class HintNotes:
    """What following hints has in common, whatever the tree.

    Args:
        tree: the prefix cache.
        keys: of requests in it.
        tenant: the field that tells tenants apart.
        quota: blocks that hints may keep.
        clock: returns the time, in seconds.

    Attributes:
        wishes: what is kept.
    """

    def __init__(
        self,
        tree: KeepingTree,
        keys: RequestKeys,
        tenant: str,
        quota: int,
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._tenant = tenant
        self._clock = clock
        self.wishes = Wishes(tree, quota)
        self._ends: OrderedDict[tuple[str, str], list[tuple[Namespace, Any]]] = (
            OrderedDict()
        )

    @property
    def num_noted(self) -> int:
        """How much is remembered of hints, for tests: wishes, and ends to come."""
        return len(self.wishes)

    @staticmethod
    def hints_of(request: Request) -> Hints | None:
        """Return the hints of a request; wrong ones are warned of, and ignored.

        The front end has refused wrong ones already, if it could.
        """
        known = request.__dict__
        if _HINTS not in known:
            params = request.sampling_params
            try:
                known[_HINTS] = parse_hints(params and params.extra_args)
            except HintError as error:
                logger.warning(
                    "The hints of request %s are ignored: %s", request.request_id, error
                )
                known[_HINTS] = None
        hints: Hints | None = known[_HINTS]
        return hints

    # -- what hints ask for ----------------------------------------------------

    @staticmethod
    def level_to_go(hints: Hints) -> int | None:
        """Return how soon a request's path is to go; None if it is not to."""
        if hints.end_session:
            return 0
        return 1 + MOST_PRIORITY + hints.priority if hints.priority < 0 else None

    def wish(
        self,
        request: Request,
        hints: Hints,
        path: Callable[[], Sequence[int]],
        end: int | None = None,
    ) -> None:
        """Keep a request's path, if its hints say so: O(blocks).

        Args:
            request: that has ended.
            hints: of it.
            path: returns the cached blocks that it takes.
            end: of the path; None for its last block.
        """
        seconds = hints.keep_for
        if hints.expect_in:
            margin = max(MIN_MARGIN, MARGIN * hints.expect_in)
            seconds = max(seconds, hints.expect_in + margin)
        if hints.priority and not seconds:
            seconds = PRIORITY_SECONDS
        if seconds:
            once = bool(hints.expect_in) and not hints.keep_for
            until, tenant = self._clock() + seconds, self.tenant_of(request)
            self.wishes.add(tenant, path(), hints.priority, until, once, end)

    def remember(self, request: Request, end: Any) -> None:
        """Remember where a response ended, for one that will replace it.

        Args:
            request: that has ended.
            end: what ``ended`` is to yield.
        """
        # Clients choose ids: anything may be in one.
        match = _ID.fullmatch(request.request_id)
        name, tenant = (
            match[1] if match else request.request_id,
            self.tenant_of(request),
        )
        if max(len(name), len(tenant)) > MOST_CHARACTERS:
            return
        ends = self._ends.setdefault((tenant, name), [])
        self._ends.move_to_end((tenant, name))
        ends.append((self._keys.owner(request), end))
        del ends[:-MOST_SAMPLES]
        if len(self._ends) > MOST_ENDS:
            self._ends.popitem(last=False)

    def ended(self, request: Request, response: str) -> Iterator[Any]:
        """Yield where the answers of a response ended that a request may replace."""
        tenant, owner = self.tenant_of(request), self._keys.owner(request)
        # The ids of completions, unlike those of chats, get the number of the prompt.
        for name in (response, f"{response}-0"):
            for theirs, end in self._ends.get((tenant, name), ()):
                if theirs == owner:
                    yield end

    def tenant_of(self, request: Request) -> str:
        """Return whose request it is."""
        return Tenants.of(request, self._tenant)

    # -- time ------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Drop the wishes whose time is over."""
        self.wishes.expire(now)

    def reset(self) -> None:
        """Forget everything, for the cache was emptied."""
        self.wishes.clear()
        self._ends.clear()


class _End(NamedTuple):
    """Where a request has ended: its last whole block, and what tells that again."""

    block: int
    depth: int
    tokens: bytes


class BlockHintNotes(HintNotes):
    """Follows hints where a tree keeps blocks; its arguments are ``HintNotes``'."""

    def __init__(self, tree: RadixTree, *args: Any) -> None:
        super().__init__(tree, *args)
        self._tree = tree
        # By the last block of a request that has ended and holds it still: where its
        # path ends, how deep, and the level at which it goes.
        self._to_go: dict[int, tuple[int, int, int]] = {}

    @property
    def num_noted(self) -> int:
        """How much is remembered of hints, for tests: wishes, and ends to come."""
        return super().num_noted + len(self._to_go)

    def admit(
        self, request: Request, blocks: Sequence[KVCacheBlock], num_hits: int
    ) -> None:
        """Note a request that is admitted: O(1), and O(blocks) with wishes.

        Args:
            request: it holds what was found.
            blocks: all its blocks.
            num_hits: tokens that were found.
        """
        if request.num_preemptions:
            return
        tree, found = self._tree, num_hits // self._keys.block_size
        if found:
            last = blocks[found - 1]
            # Its own blocks may be cached already.
            follower = blocks[found].block_id if found < len(blocks) else -1
            tree.note_parting(last.block_id, last.ref_cnt > 1, follower)
            if len(self.wishes):
                ids = [block.block_id for block in blocks[:found]]
                self.wishes.note_use(ids)
        hints = self.hints_of(request)
        if hints is not None and hints.replaces:
            # The branch of an earlier response goes, as far as only it has used it.
            for end in self.ended(request, hints.replaces):
                if tree.holds(end.block, end.depth, end.tokens):
                    tree.let_go(end.block, end.depth)

    def leave(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Follow the hints of a request that has ended: O(1), O(blocks) with wishes.

        Args:
            request: what it has computed is published; preempted ones are left alone.
            blocks: all its blocks, which it still holds.
        """
        if not request.is_finished() or request.resumable:
            return
        size = self._keys.block_size
        whole = min(request.num_computed_tokens, request.num_tokens) // size
        hints = self.hints_of(request)
        whole = min(whole, len(blocks))
        end, depth = self._tree.path_end(whole, lambda at: blocks[at].block_id)
        if not depth:
            return
        public = min(self._keys.num_public(request) // size, depth)
        if public:
            # One client's hint does not let go of what all share.
            last = self._tree.resident(blocks[public - 1].block_id)
            self._tree.note_parting(last, shared=True)
        self.remember(request, self._end(request, end, depth - 1))
        if hints is None:
            return
        level = self.level_to_go(hints)
        if level is not None:
            self._to_go[blocks[depth - 1].block_id] = end, depth - 1, level
            return
        resident = self._tree.resident
        self.wish(
            request, hints, lambda: [resident(b.block_id) for b in blocks[:depth]]
        )

    def _end(self, request: Request, block: int, depth: int) -> _End:
        key = self._keys.key(request, (depth + 1) * self._keys.block_size)
        at = depth * self._tree.block_bytes
        return _End(block, depth, bytes(key[at : at + self._tree.block_bytes]))

    def released(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Let go of what is of no use any more, once its request holds it no longer."""
        if self._to_go:
            for block in blocks:
                known = self._to_go.pop(block.block_id, None)
                if known is not None:
                    self._tree.let_go(*known)

    def reset(self) -> None:
        """Forget everything, for the cache was emptied."""
        super().reset()
        self._to_go.clear()
