"""The requests that wait, as a radix tree of their own.

Sorted by their tokens, each with the number of blocks it shares with the one
before: that is a radix tree laid out flat, as a suffix array stands for a suffix
tree (Manber and Myers, 1990). Requests under one node of it are neighbours, whether
or not anything of the node is cached::

    tokens            shared with the one before
    [sys A A1]        0
    [sys A A2]        2      under the node (sys A)
    [sys B]           1      under the node (sys)

To add or remove a request is a binary search and two comparisons.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_radix.tree import Namespace, Probe, common_units

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(slots=True, eq=False)
class Waiting:
    """A waiting request, or one whose prompt is being computed in chunks.

    Attributes:
        id: of the request.
        arrival: place in order of arrival; unique.
        since: when it arrived, in seconds.
        work: done when it arrived, in tokens; see ``Pace``.
        key: the tokens that may be found in the cache.
        namespace: where.
        tokens: of its prompt.
        blocks: of its prompt.
        cached: blocks of its prefix that are cached.
        tenant: whom fairness counts it for.
        probe: where its cached prefix ends.
        computing: it was admitted and is computing its prompt.
        held: since when it has waited for another to compute what they share.
        held_for: seconds that it was held before.
    """

    id: str
    arrival: int
    since: float = 0.0
    work: int = 0
    key: bytes = b""
    namespace: Namespace = None
    tokens: int = 0
    blocks: int = 0
    cached: int = 0
    tenant: str = ""
    probe: Probe | None = None
    computing: bool = False
    held: float | None = None
    held_for: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = self.blocks


class Backlog:
    """Waiting requests in order of their tokens.

    Args:
        block_bytes: bytes of a block in a key.

    Attributes:
        entries: the requests, sorted.
        shared: blocks that each shares with the one before; the first shares none.
        num_related: neighbours that share a block.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._sorted: list[tuple[int, bytes, int]] = []
        self._spaces: dict[Namespace, list[int]] = {}
        self._next_space = 0
        self.entries: list[Waiting] = []
        self.shared: list[int] = []
        self.num_related = 0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Waiting) -> None:
        """Add a request: O(log n) comparisons of keys, and O(n) in memmove."""
        space = self._spaces.get(entry.namespace)
        if space is None:
            # Number and count of its requests: keys of two are never compared.
            space = self._spaces[entry.namespace] = [self._next_space, 0]
            self._next_space += 1
        space[1] += 1
        place = space[0], entry.key, entry.arrival
        at = bisect_left(self._sorted, place)
        self._sorted.insert(at, place)
        self.entries.insert(at, entry)
        self.shared.insert(at, 0)
        self._relate(at)
        self._relate(at + 1)

    def remove(self, entry: Waiting) -> None:
        """Remove a request, in the same time."""
        at = self.find(entry)
        space = self._spaces[entry.namespace]
        space[1] -= 1
        if not space[1]:
            del self._spaces[entry.namespace]
        self.num_related -= self.shared[at] > 0
        del self._sorted[at], self.entries[at], self.shared[at]
        self._relate(at)

    def find(self, entry: Waiting) -> int:
        """Return the place of a request."""
        space = self._spaces[entry.namespace][0]
        return bisect_left(self._sorted, (space, entry.key, entry.arrival))

    def _relate(self, at: int) -> None:
        """Find out again what the request at ``at`` shares with the one before."""
        if at >= len(self.entries):
            return
        shared = 0
        if at:
            space, before, _ = self._sorted[at - 1]
            here, key, _ = self._sorted[at]
            if space == here:
                shared = common_units(before, 0, key, 0, self._block_bytes)
        self.num_related += (shared > 0) - (self.shared[at] > 0)
        self.shared[at] = shared

    def waiting_for(self, entry: Waiting, published: int) -> list[Waiting]:
        """Return who shares more with a computing request than is cached of it.

        They would compute the same blocks. O(what is returned, and those between).

        Args:
            entry: a request whose prompt is being computed.
            published: blocks of it that are in the cache.
        """
        found: list[Waiting] = []
        at = self.find(entry)
        for places, step in (
            (range(at + 1, len(self.entries)), 0),
            (range(at - 1, -1, -1), 1),
        ):
            common = len(entry.key)
            for place in places:
                common = min(common, self.shared[place + step])
                if common <= published:
                    break
                other = self.entries[place]
                if not other.computing and other.cached < common:
                    found.append(other)
        return found

    def check(self) -> None:
        """Verify the order and what neighbours share, O(everything)."""
        assert self._sorted == sorted(self._sorted)
        assert len(self._sorted) == len(self.entries) == len(self.shared)
        for at, entry in enumerate(self.entries):
            space = self._spaces[entry.namespace][0]
            assert self._sorted[at] == (space, entry.key, entry.arrival)
            before = self.entries[at - 1] if at else None
            shared = 0
            if before is not None and before.namespace == entry.namespace:
                shared = common_units(before.key, 0, entry.key, 0, self._block_bytes)
            assert self.shared[at] == shared
        assert self.num_related == sum(shared > 0 for shared in self.shared)
        assert sum(count for _, count in self._spaces.values()) == len(self.entries)


@dataclass
class View:
    """What orders look at: the backlog as arrays, in order of its tokens.

    Attributes:
        shared: blocks shared with the one before.
        cached: blocks of the prefix that are cached, or will be when those picked
            before are admitted.
        blocks: of the prompt.
        tokens: of the prompt.
        arrival: place in order of arrival.
        age: work done since it arrived, in tokens.
        waits: not admitted: left, held back, or barred.
        left: not picked yet, and free to go.
        block_size: tokens in a block.
        pace: work between admissions, as of late.
    """

    shared: Ints
    cached: Ints
    blocks: Ints
    tokens: Ints
    arrival: Ints
    age: Ints
    waits: npt.NDArray[np.bool_]
    left: npt.NDArray[np.bool_]
    block_size: int
    pace: float = 0.0

    def at(self, places: list[int]) -> "View":
        """Return some of the requests; what neighbours share is lost."""
        return View(
            np.zeros(len(places), np.int64),
            self.cached[places],
            self.blocks[places],
            self.tokens[places],
            self.arrival[places],
            self.age[places],
            self.waits[places],
            self.left[places],
            self.block_size,
            self.pace,
        )

    @property
    def uncached(self) -> Ints:
        """Tokens to compute."""
        left: Ints = self.tokens - self.cached * self.block_size
        return np.maximum(left, 1).astype(np.int64)


def view_of(backlog: Backlog, work: int, block_size: int, pace: float = 0.0) -> View:
    """Return the arrays of a backlog: O(n).

    Args:
        backlog: the requests.
        work: done so far, in tokens.
        block_size: tokens in a block.
        pace: work between admissions, as of late.
    """
    entries = backlog.entries

    def ints(values: list[int]) -> Ints:
        return np.array(values, np.int64)

    waits = np.array([not entry.computing for entry in entries], np.bool_)
    return View(
        shared=ints(backlog.shared),
        cached=ints([entry.cached for entry in entries]),
        blocks=ints([entry.blocks for entry in entries]),
        tokens=ints([entry.tokens for entry in entries]),
        arrival=ints([entry.arrival for entry in entries]),
        age=work - ints([entry.work for entry in entries]),
        waits=waits,
        left=waits.copy(),
        block_size=block_size,
        pace=pace,
    )
