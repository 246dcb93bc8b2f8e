"""What a tree of resume points is made of: edges, and the points on them."""

from collections.abc import Iterator
from typing import NamedTuple

from vllm_radix.tree.token_keys import BYTES_PER_TOKEN

_LAST = 1 << 10
"""The turn of protected points."""


class Run(NamedTuple):
    """Blocks of one cache group that a point keeps for itself.

    Attributes:
        group: the index of the group.
        first: the index of the first block among a request's.
        blocks: their ids.
    """

    group: int
    first: int
    blocks: tuple[int, ...]


class Resume(NamedTuple):
    """Where a request can go on, and with which blocks.

    Attributes:
        point: the id of the resume point.
        num_tokens: tokens that need not be computed.
        runs: of each group, the blocks that it needs.
    """

    point: int
    num_tokens: int
    runs: tuple[Run, ...]


class ResumeProbe(NamedTuple):
    """How much of a key is cached.

    Attributes:
        num_blocks: tokens after which a request can go on: a letter is one token.
        last_block: the id of the resume point that it needs; None for none.
        anchor: the id of the last point on the key's path, None for none, and how many
            tokens come before: what is added or removed behind it may change the
            answer.
    """

    num_blocks: int
    last_block: int | None
    anchor: tuple[int | None, int]


class ResumeStats(NamedTuple):
    """Sizes of a tree.

    Attributes:
        namespaces: roots.
        edges: but the roots.
        points: resume points.
        cached_blocks: blocks of all components.
        idle_blocks: those of them that no request uses.
    """

    namespaces: int
    edges: int
    points: int
    cached_blocks: int
    idle_blocks: int


class ResumePoint:
    """A number of tokens on a path after which every component can go on.

    Attributes:
        id: unlike that of any other point, ever.
        edge: that its last token lies on.
        num_tokens: how many tokens come before.
        runs: the blocks that it keeps, besides the dense blocks of its path.
        base: what the eviction clock showed when it was made or last used.
        hits: how many requests went on from it.
        shared: whether several paths go on from it, or are known to come.
        ready: whether what it keeps is written by now.
        pins: how often it is pinned.
        offered: its rank in the queue of eviction; None if it is not in it.
        ends_answer: whether it is the last one in the answer of a request.
        ahead: the tokens behind it, as a key, that what it keeps depends on as well;
            None while they are not known, when nobody can go on from it.
        turn: when it goes, of points that are not protected: those below 0 first, the
            lowest before others; those above 0 last, the highest after others.
        alive: whether it is in the tree.
    """

    __slots__ = (
        "ahead",
        "alive",
        "base",
        "edge",
        "ends_answer",
        "hits",
        "id",
        "num_tokens",
        "offered",
        "pins",
        "ready",
        "runs",
        "shared",
        "turn",
    )

    def __init__(
        self,
        id: int,
        edge: "Edge",
        num_tokens: int,
        runs: tuple[Run, ...],
        base: float,
    ) -> None:
        self.id = id
        self.edge = edge
        self.num_tokens = num_tokens
        self.runs = runs
        self.base = base
        self.hits = 0
        self.shared = False
        self.ready = True
        self.pins = 0
        self.offered: tuple[int, float] | None = None
        self.ends_answer = False
        self.ahead: bytes | None = b""
        self.turn = 0
        self.alive = True

    def run(self, group: int) -> Run | None:
        """Return the blocks of a group that it keeps; None for none."""
        return next((run for run in self.runs if run.group == group), None)

    def leads_to(self, key: bytes) -> bool:
        """Return whether what it keeps is right for a key, as far as that goes."""
        if not self.ahead:
            return self.ahead is not None
        start = self.num_tokens * BYTES_PER_TOKEN
        part = key[start : start + len(self.ahead)]
        return self.ahead.startswith(bytes(part))

    @property
    def protected(self) -> bool:
        """Whether it is to go last: it is pinned, or being written."""
        return self.pins > 0 or not self.ready

    @property
    def order(self) -> int:
        """Its turn, that of protected points included: the last one."""
        return _LAST if self.protected else self.turn

    @property
    def blocks(self) -> Iterator[int]:
        """The ids of the blocks that it keeps."""
        for run in self.runs:
            yield from run.blocks


class Edge:
    """A run of tokens that no other path shares in part.

    Attributes:
        key: its tokens.
        start: how many tokens come before it.
        parent: the edge before; None for a root.
        children: the edges after it, by their first token.
        points: the resume points on it, in order; one may lie at its end.
        dense: for each dense group, the ids of the whole blocks that end on this
            edge, in order and without gaps, as far as a point needs them.
        num_idle: idle blocks among them.
        windows: for each group with windows, the whole blocks that end on this edge
            and that some point keeps, by index.
        shared_to: tokens up to which several paths have used it; 0 for none.
    """

    __slots__ = (
        "children",
        "dense",
        "key",
        "num_idle",
        "parent",
        "points",
        "shared_to",
        "start",
        "windows",
    )

    def __init__(
        self,
        key: bytes,
        start: int,
        parent: "Edge | None",
        num_dense: int,
        num_windows: int,
    ) -> None:
        self.key = key
        self.start = start
        self.parent = parent
        self.children: dict[bytes, Edge] = {}
        self.points: list[ResumePoint] = []
        self.dense: list[list[int]] = [[] for _ in range(num_dense)]
        self.num_idle = 0
        self.shared_to = 0
        self.windows: list[dict[int, int]] = [{} for _ in range(num_windows)]

    @property
    def end(self) -> int:
        """How many tokens there are up to its end."""
        return self.start + len(self.key) // BYTES_PER_TOKEN

    def tokens(self, start: int, end: int) -> bytes:
        """Return its tokens between two places of the path."""
        first = (start - self.start) * BYTES_PER_TOKEN
        return self.key[first : first + (end - start) * BYTES_PER_TOKEN]

    def point_at(self, num_tokens: int) -> ResumePoint | None:
        """Return its point after so many tokens; None if there is none: O(points)."""
        for point in reversed(self.points):
            if point.num_tokens <= num_tokens:
                return point if point.num_tokens == num_tokens else None
        return None
