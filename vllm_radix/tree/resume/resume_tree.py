"""A radix tree of tokens whose values are resume points.

A model with windows or states beside full attention can go on after ``n`` cached
tokens only if all its layers can: the full ones need all tokens, the others a window
before ``n``, or the state after exactly ``n``. A *resume point* is such an ``n`` on a
path, with all that is needed there. It is whole as long as it lives, so that a look-up
is a walk::

    root --[system prompt]--*--[user A]------*----*
                            +--[user B]----*

A point keeps the blocks that only some component needs (``runs``): windows, states and
the last, partly used block of full attention. Whole dense blocks lie on the edges,
and stay while any point lies behind them. What leads to no point is forgotten. This is
RadixAttention's tree (Zheng et al., 2024) with tokens for letters, and Marconi's states
(Pan et al., "Marconi: Prefix Caching for the Era of Hybrid LLMs", 2024) for points.

The tree decides and never touches memory, as ``PrefixCache``: blocks are held while a
request uses them, idle when cached and not in use.

Costs below: L tokens compared, d edges on the path.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from vllm_radix.tree.changes import ChangeLog
from vllm_radix.tree.node import HOLE
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.resume.hinted_points import HintedPoints
from vllm_radix.tree.resume.point import Edge, ResumePoint, Run

BlockAt = Callable[[int, int], int]
"""Returns a request's block, of a group and an index; ``HOLE`` where it has none."""


class ResumeTree(HintedPoints):
    """Maps token prefixes to the blocks with which a request can go on.

    Args:
        components: of each cache group.

    Its attributes are those of ``HintedPoints`` and ``ResumeState``.

    >>> from vllm_radix.tree import encode
    >>> from vllm_radix.tree.resume import Dense, State
    >>> tree = ResumeTree([Dense(2), State(2)])
    >>> tables = [[1, 2], [0, 3]]
    >>> point, new = tree.add(encode([5, 6, 7]), None, 3, lambda g, i: tables[g][i])
    >>> tree.find(encode([5, 6, 7, 8]), None, 3).runs
    (Run(group=0, first=0, blocks=(1, 2)), Run(group=1, first=1, blocks=(3,)))
    >>> tree.release([1, 2, 3])
    >>> tree.evict(1)
    [2, 3, 1]
    """

    # -- adding ----------------------------------------------------------------

    def add(
        self,
        key: bytes,
        namespace: Namespace,
        num_tokens: int,
        block_at: BlockAt,
        *,
        shared: bool = False,
        ready: bool = True,
        ahead: bytes | None = b"",
    ) -> tuple[ResumePoint, list[int]] | None:
        """Add a resume point; what it keeps becomes cached, and held.

        O(L + d), and what is new.

        Args:
            key: at least ``num_tokens`` tokens.
            namespace: where to put it.
            num_tokens: after which it lies; at least 1.
            block_at: the blocks of the request that has computed them.
            shared: whether several paths are known to go on from it.
            ready: whether its blocks are written by now; see ``make_ready``.
            ahead: see ``ResumePoint``, and ``note_ahead``.

        Returns:
            The point, and the blocks that were not cached. None if there is one
            already, the request does not have all that is needed, or no component
            can go on after so many tokens.

        Raises:
            ValueError: a block is cached on another path.
        """
        if num_tokens < 1 or any(num_tokens % c.grain for c in self.components):
            return None
        path = self._paths.walk(key, namespace, num_tokens)
        depth = path[-1][1] if path else 0
        if depth == num_tokens:
            known = path[-1][0].point_at(num_tokens)
            if known is not None:
                known.shared |= shared
                known.base = self._evictor.clock
                if known.turn < 0:
                    self._move(known, 0)
                return None
        runs: list[Run] = []
        missing: list[list[int]] = []
        for group, component in enumerate(self.components):
            size = component.block_size
            first, whole = component.first_block(num_tokens), 0
            if group in self._dense:
                first = whole = num_tokens // size
                ids = [block_at(group, i) for i in range(depth // size, whole)]
                missing.append(ids)
                if HOLE in ids:
                    return None
            else:
                more = component.first_kept(num_tokens)
                if HOLE not in (block_at(group, i) for i in range(more, first)):
                    first = more
            end = component.end_block(num_tokens)
            kept = tuple(block_at(group, i) for i in range(first, end))
            if HOLE in kept:
                return None
            if kept:
                runs.append(Run(group, first, kept))
        for ids in missing:
            for block in ids:
                if block in self._paths.edge_of:
                    raise ValueError(f"block {block} is cached on another path")
        edge = self._paths.extend(path, key, namespace, num_tokens)
        clock = self._evictor.clock
        point = ResumePoint(next(self._ids), edge, num_tokens, tuple(runs), clock)
        point.shared, point.ready, point.ahead = shared, ready, ahead
        new: list[int] = []
        for group, ids in enumerate(missing):
            self._paths.append_dense(edge, group, ids)
            new += self._uses.add(ids)
        new += self._uses.add(point.blocks)
        self._insert_point(edge, point)
        if ready:
            self._publish(point)
        return point, new

    def make_ready(self, point: ResumePoint) -> None:
        """Note that what a point keeps is written: it can be found now. O(d)."""
        if point.alive and not point.ready:
            point.ready = True
            self._evictor.offer(point)
            self._publish(point)

    def note_ahead(self, point: ResumePoint, ahead: bytes) -> None:
        """Note the tokens behind a point that it depends on: it can be found now."""
        if point.alive and point.ahead is None:
            point.ahead = ahead
            self.version += 1
            if point.ready:
                self._announce(point)

    def _publish(self, point: ResumePoint) -> None:
        """Let a point be found, and its windows from other points: O(d, blocks)."""
        for which, group in enumerate(self._windows):
            run = point.run(group)
            if run is not None:
                whole = point.num_tokens // self.components[group].block_size
                blocks = run.blocks[: whole - run.first]
                self._paths.append_window(point.edge, which, run.first, blocks)
        self._announce(point)

    def remove(self, point: ResumePoint) -> list[int]:
        """Remove a point and what only it needed; return blocks that were idle.

        O(what goes).
        """
        if not point.alive:
            return []
        point.alive = False
        self.version += 1
        del self._points[point.id]
        if self.changes is not None:
            self.changes.removed_blocks.append(point.id)
            self._announce(point)  # to those who needed it without getting there
        self._pinned.discard(point.id)
        self._pinned_idle = None
        edge = point.edge
        at = edge.points.index(point)
        del edge.points[at]
        near = edge.points[max(0, at - 1) : at + 1]
        gone = [b for run in point.runs for b in reversed(run.blocks)]
        freed = self._uses.drop(gone)
        trimmed, edge = self._paths.trim(edge)
        freed += self._uses.drop(trimmed)
        # Its neighbours keep blocks alone now, or lead nowhere else.
        for other in (*near, *edge.points[-1:]):
            self._evictor.offer(other)
        self._forget_turn(point)
        if point.turn > 0 and self.on_unkept is not None:
            self.on_unkept(point.id)
        return freed

    def note_hit(self, point_id: int) -> None:
        """Note that a request goes on from a point: O(1)."""
        point = self._points.get(point_id)
        if point is not None:
            point.hits += 1
            # The path that led there went on, or comes again.
            point.shared |= point.hits > 1
            point.base = self._evictor.clock

    def note_answer(
        self, key: bytes, namespace: Namespace, start: int, end: int
    ) -> None:
        """Note that an answer was made of some tokens of a path, for ``ends_answer``.

        O(L + d), and the points on the last edges.

        Args:
            key: at least ``end`` tokens.
            namespace: of the key.
            start: tokens before the answer.
            end: tokens up to its end.
        """
        for edge, depth in reversed(self._paths.walk(key, namespace, end)):
            for point in reversed(edge.points):
                if point.num_tokens <= depth:
                    point.ends_answer |= point.num_tokens > start
                    return

    def ends_answer(self, point_id: int, num_tokens: int) -> bool:
        """Return whether a point lies after so many tokens, and last in an answer."""
        point = self._points.get(point_id)
        return (
            point is not None and point.ends_answer and point.num_tokens == num_tokens
        )

    # -- holding and letting go ------------------------------------------------

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held, O(1) each. Others are left alone."""
        self._uses.acquire(blocks)
        self._pinned_idle = None

    def release(self, blocks: Iterable[int]) -> None:
        """Make held blocks idle, O(1) each. Others are left alone."""
        self._uses.release(blocks)

    def pin(self, point_id: int) -> None:
        """Evict a point last: a bias, not a lock. Pins are counted. O(1)."""
        point = self._points.get(point_id)
        if point is not None:
            point.pins += 1
            self._pinned.add(point_id)
            self._pinned_idle = None

    def unpin(self, point_id: int) -> None:
        """Take back one ``pin`` of a point, if it is still there: O(log n)."""
        point = self._points.get(point_id)
        if point is not None and point.pins:
            point.pins -= 1
            if not point.pins:
                self._pinned.discard(point_id)
                self._pinned_idle = None
                self._evictor.offer(point)

    def pinned_blocks(self) -> set[Hashable]:
        """Return the ids of the pinned points."""
        return set(self._pinned)

    @property
    def num_pinned_idle(self) -> int:
        """Idle blocks that pinned points need: O(those points), or O(1)."""
        if self._pinned_idle is None:
            taken: dict[Any, int] = {}
            self._pinned_idle = sum(
                self.idle_on_path(point, taken, take=True) for point in self._pinned
            )
        return self._pinned_idle

    def idle_on_path(
        self, point_id: int, taken: dict[Any, int], take: bool = False
    ) -> int:
        """Return the idle blocks that a request would hold by going on at a point.

        O(d, and the blocks that the point keeps).

        Args:
            point_id: of the point; one that is gone needs nothing.
            taken: what is to count as held: edges up to a depth, and blocks; and, by
                ``(edge,)``, that some of those blocks lie on an edge.
            take: add the point's to ``taken``.
        """
        point = self._points.get(point_id)
        if point is None:
            return 0
        found = 0
        for run in point.runs:
            size = self.components[run.group].block_size
            for index, block in enumerate(run.blocks, run.first + 1):
                if block not in self._uses.idle or block in taken:
                    continue
                # What a point keeps in part, another may keep as a whole.
                whole = self._paths.edge_of.get(block)
                if whole is not None and index * size <= taken.get(whole, 0):
                    continue
                found += 1
                if take:
                    taken[block] = 1
                    if whole is not None:
                        taken[whole,] = 1
        edge: Edge | None = point.edge
        end = point.num_tokens
        while edge is not None:
            before = taken.get(edge, edge.start)
            if before < end:
                found += self._idle_between(edge, before, end, taken)
                if take:
                    taken[edge] = end
            end, edge = edge.start, edge.parent
        return found

    def _idle_between(
        self, edge: Edge, start: int, end: int, taken: dict[Any, int]
    ) -> int:
        """Return the idle dense blocks of an edge between places, but taken ones."""
        if not edge.num_idle:
            return 0
        if start == edge.start and end == edge.end and (edge,) not in taken:
            return edge.num_idle
        found = 0
        for group, ids in zip(self._dense, edge.dense, strict=True):
            size = self.components[group].block_size
            before = edge.start // size
            part = ids[start // size - before : end // size - before]
            found += sum(b in self._uses.idle and b not in taken for b in part)
        return found

    # -- evicting --------------------------------------------------------------

    def evict(self, count: int) -> list[int]:
        """Evict at least ``count`` idle blocks, point by point; return them.

        More may go, for a point goes with all that only it needs; fewer if there
        are no more. O(log n) for each point, and what goes.
        """
        freed: list[int] = []
        while len(freed) < count:
            point = self._evictor.take()
            if point is None and self._uses.idle:
                # What is idle lies before points whose own blocks are held.
                point = self._evictor.take_parked()
            if point is None:
                break
            if self.history is not None:
                namespace = self._paths.namespace(point.edge)
                self.history.note(self._paths.key_of(point), namespace)
            freed += self.remove(point)
        return freed

    def discard(self, block: int) -> list[int]:
        """Remove what needs a block; return blocks that were idle: O(everything)."""
        if block not in self._uses:
            return []
        doomed = [p for p in self._points.values() if block in p.blocks]
        edge = self._paths.edge_of.get(block)
        if edge is not None:
            for group, ids in zip(self._dense, edge.dense, strict=True):
                if block in ids:
                    size = self.components[group].block_size
                    end = (edge.start // size + ids.index(block) + 1) * size
                    doomed += [p for p in edge.points if p.num_tokens >= end]
            stack = list(edge.children.values())
            while stack:
                below = stack.pop()
                doomed += below.points
                stack += below.children.values()
        return [freed for point in doomed for freed in self.remove(point)]

    def reset(self) -> None:
        """Forget everything."""
        for point in self._points.values():
            point.alive = False
        self._start_empty()
        if self.history is not None:
            self.history.clear()
        self.version += 1
        if self.changes is not None:
            self.changes.rescan_all = True

    def is_worth_room(self, tokens: int, blocks: int) -> bool:
        """Return whether a new point is worth what has to go for it.

        O(log n) for each point looked at.

        Args:
            tokens: that it would save.
            blocks: that it would keep.
        """
        return self._evictor.is_worth_room(tokens / blocks)

    def _worth(self, point: ResumePoint) -> float | None:
        """Return the tokens that a point saves for each block that goes with it.

        None if none of them is idle. Those that are held count as well, so that the
        worth does not change as they come and go. O(what the point needs besides those
        above it).
        """
        edge = point.edge
        blocks = [block for block in point.blocks if self._uses.count(block) == 1]
        superseded = point is not edge.points[-1]
        above = self._paths.point_before(point)
        start = above.num_tokens if above is not None else 0
        if not superseded and not edge.children:
            first = max(start, edge.start)
            for group, ids in zip(self._dense, edge.dense, strict=True):
                size = self.components[group].block_size
                blocks += ids[first // size - edge.start // size :]
        if not any(block in self._uses.idle for block in blocks):
            return None
        if superseded and not point.shared:
            return 0.0
        return (point.num_tokens - start) / len(blocks)

    # -- keeping count ---------------------------------------------------------

    def _insert_point(self, edge: Edge, point: ResumePoint) -> None:
        at = len(edge.points)
        while at and edge.points[at - 1].num_tokens > point.num_tokens:
            at -= 1
        edge.points.insert(at, point)
        self._points[point.id] = point
        self.version += 1
        for other in edge.points[max(0, at - 1) : at + 2]:
            self._evictor.offer(other)

    def _announce(self, point: ResumePoint) -> None:
        """Log a point that came or goes: look-ups that ended above it may differ."""
        if self.changes is None:
            return
        above, following = self._paths.way_on(
            point, self.following_bytes // self.block_bytes
        )
        end: Hashable
        if above is not None:
            end = above.id
        else:
            end = ChangeLog.root(self._paths.namespace(point.edge))
        self.changes.added_edges.append((end, following))
        if self._reach:
            below = self._paths.points_below(point, self._reach)
            self.changes.removed_blocks += [other.id for other in below]
