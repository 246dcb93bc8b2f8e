"""What a tree of resume points is, and what it answers; not public.

``ResumeTree`` builds its changes on this.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.debug.miss import Miss
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.resume.check import check_tree, check_turns, dump
from vllm_radix.tree.resume.components import Component, Dense
from vllm_radix.tree.resume.evictor import ResumeEvictor
from vllm_radix.tree.resume.miss import EvictedPoints, explain
from vllm_radix.tree.resume.paths import Paths
from vllm_radix.tree.resume.point import (
    Edge,
    Resume,
    ResumePoint,
    ResumeProbe,
    ResumeStats,
    Run,
)
from vllm_radix.tree.resume.uses import BlockUses
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN


class ResumeState:
    """The parts of a tree of resume points, and its look-ups.

    Args:
        components: of each cache group.

    Attributes:
        components: as given.
        version: grows with every change of what ``find`` could answer.
        changes: log of what may change a look-up's answer, if somebody reads it.
        history: set by ``remember_evictions``, to learn from ``explain`` what was
            evicted; then an eviction is O(the tokens before the point) more.
        following_bytes: of the tokens behind a place in ``changes``; fewer where a
            point lies nearer.
        tells_all: whether the log has every such change: where there is a state. Else a
            request may go on between points, too; that such a place became, or is no
            more, one to go on from is logged for places near the point only.
    """

    block_size = 1
    block_bytes = BYTES_PER_TOKEN
    following_bytes = 16 * BYTES_PER_TOKEN
    num_unhit = 0

    def __init__(self, components: Sequence[Component]) -> None:
        self.components = tuple(components)
        self.version = 0
        self.changes: ChangeLog | None = None
        self.history: EvictedPoints | None = None
        self._ids = count()
        self._dense = [
            group for group, c in enumerate(self.components) if isinstance(c, Dense)
        ]
        self._windows = [
            group
            for group, c in enumerate(self.components)
            if c.positional and not isinstance(c, Dense)
        ]
        self._positional = all(c.positional for c in self.components)
        self.tells_all = not self._positional
        # How far behind a point its coming or going may change what is found.
        self._reach = max(c.reach for c in self.components) if self._positional else 0
        self._start_empty()

    def _start_empty(self) -> None:
        self._paths = Paths(
            [self.components[group] for group in self._dense],
            [self.components[group] for group in self._windows],
        )
        self._evictor = ResumeEvictor(self._worth)
        self._points: dict[int, ResumePoint] = {}
        self._uses = BlockUses(self._paths, self._on_release)
        self._pinned: set[int] = set()
        self._ids_kept: set[int] = set()
        self._ids_to_go: set[int] = set()
        self._pinned_idle: int | None = None

    def _worth(self, point: ResumePoint) -> float | None:
        raise NotImplementedError

    def _on_release(self) -> None:
        self._pinned_idle = None
        self._evictor.note_released()

    # -- looking up ------------------------------------------------------------

    def places(
        self, key: bytes, namespace: Namespace, limit: int
    ) -> Iterator[tuple[ResumePoint, int]]:
        """Yield where a request may go on, the latest place first: O(L + points).

        Args:
            key: tokens; those behind ``limit`` count for what depends on them.
            namespace: where to look.
            limit: most tokens before a place.

        Yields:
            A point, and how many tokens of its path need not be computed: all up to
            the point; or, for points beyond a place where paths part, all up to there.
            ``resume`` says whether enough is kept for that.
        """
        for edge, end in reversed(self._paths.walk(key, namespace, limit)):
            exact = edge.point_at(end)
            if exact is not None and exact.ready and exact.leads_to(key):
                yield exact, end
            if self._positional:
                for point in self._paths.points_beyond(edge, end):
                    yield point, end
            for point in reversed(edge.points):
                if point.num_tokens < end and point.ready and point.leads_to(key):
                    yield point, point.num_tokens

    def find(self, key: bytes, namespace: Namespace, limit: int) -> Resume | None:
        """Return where a request can go on, as late as possible: O(L + d + blocks)."""
        for point, num_tokens in self.places(key, namespace, limit):
            found = self.resume(point, num_tokens)
            if found is not None:
                return found
        return None

    def resume(self, point: ResumePoint, num_tokens: int) -> Resume | None:
        """Return all that a request needs to go on: O(d + blocks).

        Before the point, windows are put together from what any points keep.

        Args:
            point: on its path, or beyond.
            num_tokens: that need not be computed.

        Returns:
            The blocks; None if not all of them are kept.
        """
        kept = self._kept_runs(point, num_tokens)
        if kept is None:
            return None
        runs = []
        for group, component in enumerate(self.components):
            run = kept.get(group)
            if run is None:
                end = component.end_block(num_tokens)
                blocks = self._dense_blocks(point, group)[:end]
                run = Run(group, 0, tuple(blocks))
            runs.append(run)
        return Resume(point.id, num_tokens, tuple(runs))

    def _kept_runs(self, point: ResumePoint, num_tokens: int) -> dict[int, Run] | None:
        """Return the blocks of all groups but dense ones; None if some lack."""
        runs = {}
        for group, component in enumerate(self.components):
            if group not in self._dense:
                first = component.first_block(num_tokens)
                end = component.end_block(num_tokens)
                blocks = tuple(self._kept(point, group, first, end))
                if len(blocks) < end - first:
                    return None
                runs[group] = Run(group, first, blocks)
        return runs

    def _dense_blocks(self, point: ResumePoint, group: int) -> list[int]:
        """Return the blocks of a dense group up to a point."""
        at = self._dense.index(group)
        parts: list[list[int]] = []
        edge: Edge | None = point.edge
        while edge is not None:
            parts.append(edge.dense[at])
            edge = edge.parent
        blocks = [block for part in reversed(parts) for block in part]
        del blocks[point.num_tokens // self.components[group].block_size :]
        run = point.run(group)
        return blocks + list(run.blocks) if run is not None else blocks

    def _kept(
        self, point: ResumePoint, group: int, first: int, end: int
    ) -> Sequence[int]:
        """Return blocks of a window or a state on a point's path; none if some lack."""
        run = point.run(group)
        if run is not None and run.first <= first:
            return run.blocks[first - run.first : end - run.first]
        if group not in self._windows or first == end:
            return ()
        which = self._windows.index(group)
        last: tuple[int, ...] = ()
        if run is not None and run.first < end:
            # Its own, and those before it.
            last, end = run.blocks[: end - run.first], run.first
        blocks = self._paths.window(point.edge, which, first, end)
        return () if blocks is None else (*blocks, *last)

    def probe(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        last: Any = None,
    ) -> ResumeProbe:
        """Return how much of a key is cached: O(L + d).

        Args:
            key: tokens.
            namespace: where to look.
            limit: most tokens to match.
            last: the previous answer; of no use here.
        """
        tokens = len(key) // BYTES_PER_TOKEN
        tokens = tokens if limit is None else min(limit, tokens)
        found = needed = None
        for point, num_tokens in self.places(key, namespace, tokens):
            if found is None and self._kept_runs(point, num_tokens) is not None:
                found, needed = num_tokens, point.id
            if num_tokens == point.num_tokens:
                return ResumeProbe(found or 0, needed, (point.id, num_tokens))
        return ResumeProbe(found or 0, needed, (None, 0))

    def remember_evictions(self) -> EvictedPoints:
        """Return a ``history``, kept from now on, for ``explain``."""
        self.history = EvictedPoints()
        return self.history

    def explain(
        self,
        key: bytes,
        namespace: Namespace = None,
        limit: int | None = None,
        *,
        least: int = 1,
        grain: int = 1,
    ) -> Miss:
        """Return why a request cannot go on later than it does.

        O(L + d), and O(L) in each of up to 64 other namespaces.

        Args:
            key: tokens.
            namespace: where to look.
            limit: most tokens to match.
            least: fewest tokens that are worth a point.
            grain: points lie at multiples of so many tokens.
        """
        tokens = len(key) // BYTES_PER_TOKEN
        tokens = tokens if limit is None else min(limit, tokens)
        found = self.probe(key, namespace, tokens).num_blocks
        return explain(
            self._paths, self.history, key, namespace, tokens, found, least, grain
        )

    # -- reading ---------------------------------------------------------------

    def __contains__(self, block: object) -> bool:
        return block in self._uses

    def is_idle(self, block: int) -> bool:
        """Return whether a block is cached and no request uses it."""
        return block in self._uses.idle

    @property
    def num_cached(self) -> int:
        """Number of cached blocks, of all components."""
        return len(self._uses)

    @property
    def num_points(self) -> int:
        """Number of resume points."""
        return len(self._points)

    @property
    def num_idle(self) -> int:
        """Number of idle blocks."""
        return len(self._uses.idle)

    def stats(self) -> ResumeStats:
        """Return the sizes: O(edges)."""
        return ResumeStats(
            len(self._paths.roots),
            sum(1 for _ in self._paths.edges()),
            len(self._points),
            len(self._uses),
            self.num_idle,
        )

    def dump(self, tokens: int = 6) -> str:
        """Return the tree as text: a line an edge, children indented."""
        return dump(self._paths, tokens)

    def check(self) -> None:
        """Verify every invariant, O(everything); dump the tree on failure.

        Raises:
            AssertionError: an invariant is broken.
        """
        try:
            check_tree(self.components, self._paths, self._points, self._uses)
            check_turns(self._points, self._ids_kept, self._ids_to_go)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.dump()}") from error
