"""The paths of a tree of resume points: one letter is one token.

Dense blocks lie on the edges, each at its last token::

    tokens   0        4        8        12       16
    edge     [--- system prompt ---|            blocks of 4: ends 4, 8
    edges                          +- user A ---|            ends 12, 16
                                   +- user B -|              ends 12

A block whose tokens lie on two edges belongs to the lower one, whose path has all of
them. Where a branch begins inside a block, each side has a block of its own.
"""

from collections.abc import Iterator, Sequence

from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.resume.components import Component
from vllm_radix.tree.resume.point import Edge, ResumePoint
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN, common_units

_MAX_EDGES = 32
"""Edges looked at for a point beyond a place where paths part."""

Step = tuple[Edge, int]
"""An edge on the path of a key, and how many tokens of the key match up to there."""


class Paths:
    """Edges, and which of them each dense block lies on.

    Args:
        dense: the components whose blocks lie on the edges without gaps.
        windows: those of which some blocks do.

    Attributes:
        roots: of each namespace.
        edge_of: of each dense block.
        window_of: of each block of a window on an edge: the edge, which of the
            components, and the index of the block.
        idle: cached blocks that no request uses, dense or not.
        visited: edges looked at, for proofs of cost.
    """

    def __init__(
        self, dense: Sequence[Component], windows: Sequence[Component]
    ) -> None:
        self._sizes = [component.block_size for component in dense]
        self._window_sizes = [component.block_size for component in windows]
        self.roots: dict[Namespace, Edge] = {}
        self.edge_of: dict[int, Edge] = {}
        self.window_of: dict[int, tuple[Edge, int, int]] = {}
        self.idle: set[int] = set()
        self.visited = 0

    def walk(self, key: bytes, namespace: Namespace, limit: int) -> list[Step]:
        """Return the edges that a key runs along: O(tokens in memcmp + edges).

        Args:
            key: tokens.
            namespace: where to look.
            limit: most tokens to match.
        """
        path: list[Step] = []
        edge, depth = self.roots.get(namespace), 0
        while edge is not None and depth < limit:
            self.visited += 1
            at = depth * BYTES_PER_TOKEN
            child = edge.children.get(bytes(key[at : at + BYTES_PER_TOKEN]))
            if child is None:
                break
            if child.end <= limit and key.startswith(child.key, at):
                depth = child.end
            else:
                depth += common_units(child.key, 0, key, at, BYTES_PER_TOKEN)
                depth = min(depth, limit)
            path.append((child, depth))
            if depth < child.end:
                break
            edge = child
        return path

    def extend(
        self, path: list[Step], key: bytes, namespace: Namespace, end: int
    ) -> Edge:
        """Return the edge of a key's token ``end - 1``, added where it is missing.

        O(new tokens), and the shorter part of an edge that is split.

        Args:
            path: of the key.
            key: tokens.
            namespace: where they are.
            end: how far the path is to go.
        """
        if not path:
            edge, depth = self.roots.get(namespace), 0
            if edge is None:
                edge = self.roots[namespace] = self._edge(b"", 0, None)
        else:
            edge, depth = path[-1]
        if depth == end:
            return edge
        rest = bytes(key[depth * BYTES_PER_TOKEN : end * BYTES_PER_TOKEN])
        if depth < edge.end:
            edge = self.split(edge, depth)
        elif edge.parent is not None and not edge.children:
            edge.key += rest
            return edge
        edge.shared_to = max(edge.shared_to, depth)
        child = self._edge(rest, depth, edge)
        edge.children[rest[:BYTES_PER_TOKEN]] = child
        return child

    def _edge(self, key: bytes, start: int, parent: Edge | None) -> Edge:
        return Edge(key, start, parent, len(self._sizes), len(self._window_sizes))

    def split(self, edge: Edge, at: int) -> Edge:
        """Cut an edge in two; return the upper one: O(the shorter one)."""
        parent = edge.parent
        assert parent is not None and edge.start < at < edge.end
        cut = (at - edge.start) * BYTES_PER_TOKEN
        counts = [at // size - edge.start // size for size in self._sizes]
        above = [p for p in edge.points if p.num_tokens <= at]
        below = edge.points[len(above) :]
        if at - edge.start <= edge.end - at:
            upper, lower = self._edge(edge.key[:cut], edge.start, parent), edge
            self._move_dense(edge, upper, counts, first=True)
            moved = upper.points = above
            lower.points = below
        else:
            upper, lower = edge, self._edge(edge.key[cut:], at, edge)
            self._move_dense(edge, lower, counts, first=False)
            moved = lower.points = below
            upper.points = above
            lower.children = upper.children
            for child in lower.children.values():
                child.parent = lower
        for point in moved:
            point.edge = upper if lower is edge else lower
        self._move_windows(edge, upper, lower, at)
        key = edge.key
        first = key[:BYTES_PER_TOKEN]
        upper.key, lower.key = key[:cut], lower.key if upper is edge else key[cut:]
        lower.start, lower.parent = at, upper
        shared = edge.shared_to
        upper.shared_to = min(shared, at)
        lower.shared_to = shared if shared > at else 0
        upper.children = {lower.key[:BYTES_PER_TOKEN]: lower}
        parent.children[first] = upper
        return upper

    def _move_dense(
        self, edge: Edge, other: Edge, counts: list[int], first: bool
    ) -> None:
        """Move the first, or the last, dense blocks of an edge to a new one."""
        for group, count in enumerate(counts):
            ids = edge.dense[group]
            if first:
                moved, edge.dense[group] = ids[:count], ids[count:]
            else:
                edge.dense[group], moved = ids[:count], ids[count:]
            other.dense[group] = moved
            for block in moved:
                self.edge_of[block] = other
            if edge.num_idle:
                idle = sum(block in self.idle for block in moved)
                edge.num_idle -= idle
                other.num_idle += idle

    def _move_windows(self, edge: Edge, upper: Edge, lower: Edge, at: int) -> None:
        """Divide the blocks of windows on an edge that is cut."""
        for which, size in enumerate(self._window_sizes):
            blocks = edge.windows[which]
            for part in (upper, lower):
                part.windows[which] = {
                    index: block
                    for index, block in blocks.items()
                    if ((index + 1) * size <= at) == (part is upper)
                }
                if part is not edge:
                    for index, block in part.windows[which].items():
                        self.window_of[block] = part, which, index

    def join(self, upper: Edge) -> Edge:
        """Join an edge with its only child; return the edge: O(the shorter one)."""
        ((_, lower),) = upper.children.items()
        parent = upper.parent
        assert parent is not None
        key = upper.key + lower.key
        if len(upper.key) >= len(lower.key):
            edge, gone, points = upper, lower, lower.points
            edge.children = lower.children
            for child in edge.children.values():
                child.parent = edge
        else:
            edge, gone, points = lower, upper, upper.points
            edge.start, edge.parent = upper.start, parent
            parent.children[key[:BYTES_PER_TOKEN]] = edge
        for ids in gone.dense:
            for block in ids:
                self.edge_of[block] = edge
        edge.dense = [[*a, *b] for a, b in zip(upper.dense, lower.dense, strict=True)]
        for which, blocks in enumerate(gone.windows):
            for index, block in blocks.items():
                edge.windows[which][index] = block
                self.window_of[block] = edge, which, index
        edge.points, edge.key = upper.points + lower.points, key
        edge.num_idle = upper.num_idle + lower.num_idle
        edge.shared_to = max(upper.shared_to, lower.shared_to)
        for point in points:
            point.edge = edge
        return edge

    def append_dense(self, edge: Edge, group: int, blocks: Sequence[int]) -> None:
        """Put whole blocks at the end of those that an edge has: O(blocks)."""
        edge.dense[group] += blocks
        for block in blocks:
            self.edge_of[block] = edge
            edge.num_idle += block in self.idle

    def append_window(
        self, edge: Edge, which: int, first: int, blocks: Sequence[int]
    ) -> None:
        """Put whole blocks of a window on the path that ends with an edge.

        Places that have one keep it. O(blocks, and edges of the path).
        """
        size = self._window_sizes[which]
        for index in range(first + len(blocks) - 1, first - 1, -1):
            while edge.start >= (index + 1) * size:
                assert edge.parent is not None
                edge = edge.parent
            block = blocks[index - first]
            if index not in edge.windows[which] and block not in self.window_of:
                edge.windows[which][index] = block
                self.window_of[block] = edge, which, index

    def drop_window(self, block: int) -> None:
        """Take a block of a window off its edge, if it is on one: O(1)."""
        where = self.window_of.pop(block, None)
        if where is not None:
            edge, which, index = where
            del edge.windows[which][index]

    def window(self, edge: Edge, which: int, first: int, end: int) -> list[int] | None:
        """Return blocks of a window on the path that ends with an edge.

        O(blocks, and edges of the path).

        Args:
            edge: the last one of the path.
            which: of the components with windows.
            first: index of the first block.
            end: index after the last block; it may end behind the path.

        Returns:
            The blocks; None if not all of them are there.
        """
        size = self._window_sizes[which]
        found = []
        for index in range(end - 1, first - 1, -1):
            while edge.start >= (index + 1) * size:
                assert edge.parent is not None
                edge = edge.parent
            block = edge.windows[which].get(index)
            if block is None:
                return None
            found.append(block)
        return found[::-1]

    def trim(self, edge: Edge) -> tuple[list[int], Edge]:
        """Forget what leads to no point, from an edge upwards: O(what goes).

        Returns:
            The dense blocks that went, the last ones first, and the edge at which
            it stopped.
        """
        gone: list[int] = []
        while not edge.children:
            last = edge.points[-1].num_tokens if edge.points else edge.start
            for group, size in enumerate(self._sizes):
                ids = edge.dense[group]
                keep = last // size - edge.start // size
                for block in reversed(ids[keep:]):
                    gone.append(block)
                    del self.edge_of[block]
                    edge.num_idle -= block in self.idle
                del ids[keep:]
            for blocks, size in zip(edge.windows, self._window_sizes, strict=True):
                for index in [i for i in blocks if (i + 1) * size > last]:
                    self.drop_window(blocks[index])
            if edge.points:
                edge.key = edge.tokens(edge.start, last)
                edge.shared_to = min(edge.shared_to, last)
                return gone, edge
            parent = edge.parent
            if parent is None:
                self.roots = {n: r for n, r in self.roots.items() if r is not edge}
                return gone, edge
            del parent.children[edge.key[:BYTES_PER_TOKEN]]
            edge.parent = None
            edge = parent
        if len(edge.children) == 1 and edge.parent is not None:
            edge = self.join(edge)
        return gone, edge

    def point_before(self, point: ResumePoint) -> ResumePoint | None:
        """Return the next point above on the same path: O(edges between)."""
        edge: Edge | None = point.edge
        assert edge is not None
        at = edge.points.index(point)
        if at:
            return edge.points[at - 1]
        edge = edge.parent
        while edge is not None and not edge.points:
            edge = edge.parent
        return edge.points[-1] if edge is not None else None

    def points_beyond(self, edge: Edge, end: int) -> Iterator[ResumePoint]:
        """Yield ready points whose paths lead past a place, the next on each.

        Where paths part, a few edges are looked at.

        Args:
            edge: on which the place is.
            end: how many tokens come before it.
        """
        stack, looked = [edge], 0
        while stack and looked < _MAX_EDGES:
            looked += 1
            edge = stack.pop()
            beyond = (p for p in edge.points if p.num_tokens > end and p.ready)
            nearest = next(beyond, None)
            if nearest is None:
                stack += edge.children.values()
            else:
                yield nearest

    def points_below(self, point: ResumePoint, reach: int) -> Iterator[ResumePoint]:
        """Yield the points behind another, up to so many tokens: O(those, edges)."""
        end = point.num_tokens + reach
        stack = [point.edge]
        while stack:
            edge = stack.pop()
            for other in edge.points:
                if point.num_tokens < other.num_tokens < end:
                    yield other
            stack += (e for e in edge.children.values() if e.start < end)

    def way_on(self, point: ResumePoint, most: int) -> tuple[ResumePoint | None, bytes]:
        """Return the next ready point above another, and the tokens that follow it.

        O(edges and points between).

        Args:
            point: to which the tokens lead.
            most: tokens, if there are so many up to the point.
        """
        above = self.point_before(point)
        while above is not None and not above.ready:
            above = self.point_before(above)
        start = 0 if above is None else above.num_tokens
        end = min(point.num_tokens, start + most)
        parts: list[bytes] = []
        edge: Edge | None = point.edge
        while edge is not None and edge.end > start:
            if edge.start < end:
                parts.append(edge.tokens(max(start, edge.start), min(end, edge.end)))
            edge = edge.parent
        return above, b"".join(reversed(parts))

    def key_of(self, point: ResumePoint) -> bytes:
        """Return the tokens before a point: O(those)."""
        parts: list[bytes] = []
        edge: Edge | None = point.edge
        end = point.num_tokens
        while edge is not None:
            parts.append(edge.tokens(edge.start, end))
            end, edge = edge.start, edge.parent
        return b"".join(reversed(parts))

    def namespace(self, edge: Edge) -> Namespace:
        """Return the namespace of an edge: O(edges above, and namespaces)."""
        while edge.parent is not None:
            edge = edge.parent
        return next(name for name, root in self.roots.items() if root is edge)

    def edges(self) -> Iterator[tuple[Namespace, Edge]]:
        """Yield all edges but the roots, with their namespaces."""
        for namespace, root in self.roots.items():
            stack = list(root.children.values())
            while stack:
                edge = stack.pop()
                yield namespace, edge
                stack += edge.children.values()
