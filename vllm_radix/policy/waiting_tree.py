"""The requests that wait, as a radix tree of their own.

Sorted by their tokens, each with the number of blocks it shares with the one
before: that is a radix tree laid out flat, as a suffix array stands for a suffix
tree (Manber and Myers, 1990). Requests under one node of it are neighbours, whether
or not anything of the node is cached::

    tokens            shared with the one before
    [sys A A1]        0
    [sys A A2]        2      under the node (sys A)
    [sys B]           1      under the node (sys)

What neighbours share is compared when it is asked for: a burst of arrivals costs a
sort, not a comparison for each.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from vllm_radix.tree import Namespace, Probe, common_units
from vllm_radix.tree.resume import ResumeProbe

_UNKNOWN = -1

_SORT_ALL = 32
"""From so many new requests on, the whole list is sorted once."""

_arrival = attrgetter("arrival")
_key = attrgetter("key")


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """A waiting request, or one whose prompt is being computed in chunks.

    Attributes:
        id: the request's id.
        arrival: its place in the order of arrival; unique.
        arrived_at: when it arrived, in seconds.
        arrived_at_work: the work done when it arrived, in tokens; see
            ``ServiceRate``.
        key: the tokens that may be found in the cache.
        namespace: where they may be found.
        tokens: the length of its prompt.
        blocks: the blocks that its prompt fills.
        cached: the blocks of its prefix that are cached.
        shared_before: the blocks that it shared with an older one when it was filed.
        tenant: whom fairness counts it for.
        adapter: the id of its LoRA adapter; 0 for none.
        probe: where its cached prefix ends.
        waits: whether it has not been admitted, or ended.
        computing: whether it was admitted and is computing its prompt.
        held_since: since when it has waited for another to compute what they share.
        held_before: the seconds that it was held before.
        times_late: how often it was held behind one that started in the same step.
    """

    id: str
    arrival: int
    arrived_at: float = 0.0
    arrived_at_work: int = 0
    key: bytes = b""
    namespace: Namespace = None
    tokens: int = 0
    blocks: int = 0
    cached: int = 0
    shared_before: int = 0
    tenant: str = ""
    adapter: int = 0
    probe: Probe | ResumeProbe | None = None
    waits: bool = True
    computing: bool = False
    held_since: float | None = None
    held_before: float = 0.0
    times_late: int = 0

    @property
    def uncached(self) -> int:
        """Blocks that are not cached."""
        return self.blocks - self.cached

    @property
    def own_uncached(self) -> int:
        """Blocks that are not cached, and not shared with an older request."""
        return max(0, self.blocks - max(self.cached, self.shared_before))

    def held_for(self, now: float) -> float:
        """Return the seconds that the request has been held, up to ``now``."""
        since = now if self.held_since is None else self.held_since
        return self.held_before + now - since


class _Level:
    """The requests of one namespace, sorted by key and then by arrival."""

    __slots__ = ("entries", "keys", "shared")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.entries: list[WaitingRequest] = []
        self.shared: list[int] = []

    def find(self, entry: WaitingRequest) -> int:
        """Return where a request is, or belongs: O(log n) comparisons of keys."""
        start = bisect_left(self.keys, entry.key)
        if start == len(self.keys) or self.keys[start] != entry.key:
            return start
        end = bisect_right(self.keys, entry.key, start)
        return bisect_left(self.entries, entry.arrival, start, end, key=_arrival)


class WaitingTree:
    """Waiting requests in the order of their tokens.

    Args:
        block_bytes: the bytes of a block in a key.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._levels: dict[Namespace, _Level] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def entries(self) -> list[WaitingRequest]:
        """Return all requests, one namespace after the other: O(n)."""
        return [e for level in self._levels.values() for e in level.entries]

    def shared(self) -> list[int]:
        """Return the blocks that each of ``entries`` shares with the one before.

        O(n), and a comparison for each that was not asked for before.
        """
        return [
            self._shared(level, at)
            for level in self._levels.values()
            for at in range(len(level.entries))
        ]

    def add(self, entry: WaitingRequest) -> None:
        """Add a request: O(log n) comparisons of keys, and O(n) in memmove."""
        level = self._levels.setdefault(entry.namespace, _Level())
        at = level.find(entry)
        level.keys.insert(at, entry.key)
        level.entries.insert(at, entry)
        level.shared.insert(at, _UNKNOWN)
        self._size += 1
        shared = self._shared(level, at)
        if at + 1 < len(level.shared):
            level.shared[at + 1] = _UNKNOWN
            shared = max(shared, self._shared(level, at + 1))
        entry.shared_before = shared

    def add_all(self, entries: Sequence[WaitingRequest]) -> None:
        """Add requests: many of them are sorted once, O((n + m) log m)."""
        if len(entries) < _SORT_ALL:
            for entry in entries:
                self.add(entry)
            return
        fresh: dict[Namespace, list[WaitingRequest]] = {}
        for entry in entries:
            fresh.setdefault(entry.namespace, []).append(entry)
        for namespace, new in fresh.items():
            level = self._levels.setdefault(namespace, _Level())
            level.entries += sorted(new, key=_arrival)
            level.entries.sort(key=_key)
            level.keys = [entry.key for entry in level.entries]
            level.shared = [_UNKNOWN] * len(level.keys)
            self._compare_with_older(level, set(new))
        self._size += len(entries)

    def _compare_with_older(self, level: _Level, added: set[WaitingRequest]) -> None:
        """Note what new requests share with older ones: O(n), and their comparisons.

        Of those that came together the first in order of tokens counts as older.
        """
        entries, behind = level.entries, 0
        for at in range(len(entries) - 1, -1, -1):
            entry = entries[at]
            if entry in added:
                shared = self._shared(level, at)
                # ``behind``: what it shares with the next older one after it.
                entry.shared_before = max(shared, behind)
                behind = min(behind, shared)
            elif at and entries[at - 1] in added:
                behind = self._shared(level, at)

    def remove(self, entry: WaitingRequest) -> None:
        """Remove a request: O(log n) comparisons of keys, and O(n) in memmove."""
        level = self._levels[entry.namespace]
        at = level.find(entry)
        assert level.entries[at] is entry, f"request {entry.id} is not in the tree"
        del level.keys[at], level.entries[at], level.shared[at]
        if at < len(level.shared):
            level.shared[at] = _UNKNOWN
        self._size -= 1
        if not level.keys:
            del self._levels[entry.namespace]

    def sharing_more(
        self, entry: WaitingRequest, cached: Callable[[WaitingRequest], int]
    ) -> Iterator[tuple[WaitingRequest, int]]:
        """Yield the requests that share more with one than is cached of them.

        They are its neighbours: O(what is yielded). The one nearest comes first on
        either side, and none farther away shares more.

        Args:
            entry: a request in the tree, that is to compute what they share.
            cached: returns the cached blocks of a request.

        Yields:
            A request, and the blocks that it shares with ``entry``.
        """
        level = self._levels[entry.namespace]
        at, count = level.find(entry), len(level.entries)
        for places, step in (
            (range(at + 1, count), 0),
            (range(at - 1, -1, -1), 1),
        ):
            common = len(entry.key) // self._block_bytes
            for place in places:
                common = min(common, self._shared(level, place + step))
                other = level.entries[place]
                if common <= cached(other):
                    break
                yield other, common

    def sharing_at_least(
        self, entry: WaitingRequest, least: int
    ) -> Iterator[tuple[WaitingRequest, int]]:
        """Yield the requests that share so many blocks with one: O(what is yielded).

        Yields:
            A request, and the blocks that it shares with ``entry``.
        """
        return self.sharing_more(entry, lambda other: least - 1)

    def uncached_sharers(
        self, entry: WaitingRequest, published: int
    ) -> list[WaitingRequest]:
        """Return the waiting requests that would compute the same blocks as one.

        They share more with it than is published of it, and less of them is cached.
        O(what is returned, and those between).

        Args:
            entry: a request whose prompt is being computed.
            published: the blocks of it that are in the cache.
        """
        others = self.sharing_at_least(entry, published + 1)
        return [
            other
            for other, common in others
            if not other.computing and other.cached < common
        ]

    def branches(
        self,
        key: bytes,
        namespace: Namespace,
        above: int,
        present: bool = False,
        ended: bool = True,
    ) -> Iterator[int]:
        """Yield where other requests part from a key, the deepest place first.

        O(log n) comparisons of keys for each place.

        Args:
            key: of a request.
            namespace: of the request.
            above: places must be deeper, in blocks.
            present: whether the request is in the tree itself.
            ended: yield places where the others end as well, though the key goes on.
        """
        level = self._levels.get(namespace)
        if level is None:
            return
        size, keys = self._block_bytes, level.keys
        before = bisect_left(keys, key)
        after = bisect_right(keys, key, before)
        whole = len(key) // size
        if after - before > present and whole > above:
            yield whole
        last = whole
        while True:
            left = common_units(keys[before - 1], 0, key, 0, size) if before else 0
            right = 0
            if after < len(keys):
                right = common_units(keys[after], 0, key, 0, size)
            place = max(left, right)
            if place <= above:
                return
            if place < last:
                # Of all that end here the last one, in order, is the neighbour.
                ends = right < place and len(keys[before - 1]) // size == place
                if ended or not ends:
                    yield place
                last = place
            prefix = key[: place * size]
            if left == place:
                before = bisect_left(keys, prefix, 0, before)
            if right == place:
                after = bisect_right(
                    keys, prefix, after, key=lambda other: other[: len(prefix)]
                )

    def under(self, prefix: bytes, namespace: Namespace) -> Iterator[WaitingRequest]:
        """Yield the requests whose keys begin with a prefix: O(log n, and those)."""
        level = self._levels.get(namespace)
        if level is not None:
            first = bisect_left(level.keys, prefix)
            for at in range(first, len(level.keys)):
                if not level.keys[at].startswith(prefix):
                    break
                yield level.entries[at]

    def _shared(self, level: _Level, at: int) -> int:
        """Return the blocks shared with the request before."""
        shared = level.shared[at]
        if shared == _UNKNOWN:
            shared = 0
            if at:
                before, key = level.keys[at - 1], level.keys[at]
                first = self._block_bytes
                if before[:first] == key[:first]:
                    shared = common_units(before, 0, key, 0, first)
            level.shared[at] = shared
        return shared

    def check(self) -> None:
        """Verify the order and what neighbours share, O(everything)."""
        assert self._size == sum(len(level.keys) for level in self._levels.values())
        for namespace, level in self._levels.items():
            assert level.keys, "an empty namespace was left behind"
            assert level.keys == [entry.key for entry in level.entries]
            places = [(entry.key, entry.arrival) for entry in level.entries]
            assert places == sorted(places), "requests are not sorted"
            assert len(level.shared) == len(level.keys)
            for at, entry in enumerate(level.entries):
                assert entry.namespace == namespace
                known = level.shared[at]
                level.shared[at] = _UNKNOWN
                assert known in (_UNKNOWN, self._shared(level, at))
                level.shared[at] = known
