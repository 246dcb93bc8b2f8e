"""How much of each waiting request is cached, kept up to date from the tree's news."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from vllm_radix.policy import WaitingRequest
from vllm_radix.tree import ChangeLog, RadixTree
from vllm_radix.tree.resume import ResumeTree

_MAX_NEWS = 10_000
"""Changes of the tree after which all is looked up again instead."""


class PrefixLookups:
    """Looks up each waiting request once, and again only when news concern it.

    Requests are filed by where their cached prefix ends: the block, and the tokens
    that come next. Those blocks are what waiting requests need; they are pinned.

    Args:
        tree: the cache.
        pin: whether to pin what waiting requests have cached.
        on_change: called with each request after it was looked up, and with its
            ``own_uncached`` before.

    Attributes:
        num_warm: requests that have a cached prefix.
        warm_blocks: uncached blocks of those requests.
    """

    def __init__(
        self,
        tree: RadixTree | ResumeTree,
        pin: bool,
        on_change: Callable[[WaitingRequest, int], None],
    ) -> None:
        self._tree = tree
        self._news = tree.changes = ChangeLog()
        self._pin = pin
        self._on_change = on_change
        self._ends: dict[Hashable, dict[bytes, set[WaitingRequest]]] = {}
        self._end_of: dict[str, tuple[Hashable, bytes]] = {}
        # The block, or point, that each needs, and how many need it.
        self._needed: dict[str, int] = {}
        self._users: dict[int, int] = {}
        self.num_warm = 0
        self.warm_blocks = 0

    def __contains__(self, entry: WaitingRequest) -> bool:
        return entry.id in self._end_of

    def __len__(self) -> int:
        return len(self._end_of)

    def look_up(self, entry: WaitingRequest) -> None:
        """Look up a request, and file it where its cached prefix ends."""
        tree, before = self._tree, entry.own_uncached
        last: Any = entry.probe
        probe = entry.probe = tree.probe(entry.key, entry.namespace, None, last)
        entry.cached = probe.num_blocks if probe else 0
        if entry.cached:
            self.num_warm += 1
            self.warm_blocks += entry.uncached
        anchor, depth = probe.anchor if probe else (None, 0)
        end = ChangeLog.root(entry.namespace) if anchor is None else anchor
        at = depth * tree.block_bytes
        following = entry.key[at : at + tree.following_bytes]
        if len(following) < tree.following_bytes > tree.block_bytes:
            following = b""  # all news behind its anchor concern it
        self._ends.setdefault(end, {}).setdefault(following, set()).add(entry)
        self._end_of[entry.id] = end, following
        needed = probe.last_block if probe else None
        if needed is not None:
            self._needed[entry.id] = needed
            users = self._users[needed] = self._users.get(needed, 0) + 1
            if users == 1 and self._pin:
                tree.pin(needed)
        self._on_change(entry, before)

    def forget(self, entry: WaitingRequest) -> bool:
        """Stop following a request; return whether it was followed."""
        known = self._end_of.pop(entry.id, None)
        if known is None:
            return False
        if entry.cached:
            self.num_warm -= 1
            self.warm_blocks -= entry.uncached
        end, following = known
        here = self._ends[end]
        here[following].discard(entry)
        if not here[following]:
            del here[following]
            if not here:
                del self._ends[end]
        needed = self._needed.pop(entry.id, None)
        if needed is not None:
            self._users[needed] -= 1
            if not self._users[needed]:
                del self._users[needed]
                if self._pin:
                    self._tree.unpin(needed)
        return True

    def end_block(self, entry: WaitingRequest) -> int | None:
        """Return the block that a request's cached prefix ends with, if any."""
        return self._needed.get(entry.id)

    def last_sharer_before(self, entry: WaitingRequest) -> int:
        """Return the arrival of the last older request with the same cached prefix.

        O(requests with that prefix).

        Returns:
            The arrival; -1 if there is none.
        """
        end, _ = self._end_of.get(entry.id, (None, b""))
        here = self._ends.get(end, {}).values()
        older = (o.arrival for same in here for o in same if o.arrival < entry.arrival)
        return max(older, default=-1)

    def catch_up(self) -> bool:
        """Look up again the requests that the tree's news concern.

        O(the news, and those concerned).

        Returns:
            Whether there were any.
        """
        news = self._news
        if not news:
            return False
        concerned: set[WaitingRequest] = set()
        if self._end_of:
            concerned = self._concerned(news)
        news.clear()
        # All are taken off first: the id of a block that has left may be another's.
        for entry in concerned:
            self.forget(entry)
        for entry in concerned:
            self.look_up(entry)
        return bool(concerned)

    def _concerned(self, news: ChangeLog) -> set[WaitingRequest]:
        concerned: set[WaitingRequest] = set()
        if news.rescan_all:
            for here in self._ends.values():
                concerned.update(*here.values())
            return concerned
        ends = self._ends
        for block in news.removed_blocks:
            if block in ends:
                concerned.update(*ends[block].values())
        whole = self._tree.following_bytes
        for before, following in news.added_edges:
            if before not in ends:
                continue
            here = ends[before]
            concerned |= here.get(following, set())
            if whole > self._tree.block_bytes:
                concerned |= here.get(b"", set())
                if len(following) < whole:
                    for filed, entries in here.items():
                        if filed.startswith(following):
                            concerned |= entries
        return concerned

    def skip(self) -> None:
        """Keep the news within bounds while nothing is looked up."""
        news = self._news
        if not self._end_of:
            news.clear()
        elif len(news.removed_blocks) + len(news.added_edges) > _MAX_NEWS:
            news.clear()
            news.rescan_all = True

    def check(self, entries: Iterable[WaitingRequest]) -> None:
        """Verify that all that is kept agrees, O(everything).

        Args:
            entries: the requests that are followed.

        Raises:
            AssertionError: it does not.
        """
        followed = {entry.id: entry for entry in entries}
        assert followed.keys() == self._end_of.keys(), "followed, and not filed"
        listed = {
            entry.id: (end, following)
            for end, here in self._ends.items()
            for following, there in here.items()
            for entry in there
        }
        assert listed == self._end_of, "not listed where filed"
        warm = [entry for entry in followed.values() if entry.cached]
        assert Counter(self._needed.values()) == self._users, "needs are miscounted"
        assert len(warm) == self.num_warm, "warm requests are miscounted"
        blocks = sum(entry.uncached for entry in warm)
        assert blocks == self.warm_blocks, "their blocks are miscounted"
        if self._news:
            return
        pinned = self._tree.pinned_blocks()
        assert not self._pin or pinned <= self._users.keys(), "pinned and not needed"
        if not self._tree.tells_all:
            return
        for entry in followed.values():
            probe = self._tree.probe(entry.key, entry.namespace)
            assert entry.cached == (probe.num_blocks if probe else 0), "old news"
        assert not self._pin or pinned == self._users.keys(), "needed and not pinned"
