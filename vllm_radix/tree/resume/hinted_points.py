"""What somebody may say of resume points: these are of no use any more, those stay.

As ``HintedTree`` for blocks. Nothing here holds a block: it changes which points go
first, and so which blocks.
"""

from collections.abc import Callable

from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.resume.point import Edge, ResumePoint
from vllm_radix.tree.resume.state import ResumeState

LEVELS = 16
"""Of what is let go, and of what is kept."""


class HintedPoints(ResumeState):
    """The operations of ``ResumeTree`` that hints need; not public.

    Attributes:
        on_unkept: called with the id of each point that is no longer kept, whatever
            the reason.
    """

    on_unkept: Callable[[int], None] | None = None

    def keep(self, point_id: int, level: int = 0) -> bool:
        """Evict a point after others: O(log n).

        After all that is neither kept nor protected, and the higher the level, the
        later. What it needs stays with it, the path before it included. It ends with
        ``unkeep``, or when the point goes.

        Args:
            point_id: of the point.
            level: from 0 to 15; replaces the one of before.

        Returns:
            Whether it is kept: not if it is gone.
        """
        point = self._points.get(point_id)
        if point is None:
            return False
        self._move(point, 1 + level)
        return True

    def unkeep(self, point_id: int) -> None:
        """Evict a point in the order of all again, if it was kept: O(log n)."""
        point = self._points.get(point_id)
        if point is not None and point.turn > 0:
            self._move(point, 0)
            if self.on_unkept is not None:
                self.on_unkept(point_id)

    @property
    def num_kept(self) -> int:
        """Number of points that are kept."""
        return len(self._ids_kept)

    def _move(self, point: ResumePoint, turn: int) -> None:
        """Give a point another turn; 0 is that of all: O(log n)."""
        self._forget_turn(point)
        point.turn = turn
        if turn > 0:
            self._ids_kept.add(point.id)
        elif turn < 0:
            self._ids_to_go.add(point.id)
        self._evictor.offer(point)

    def _forget_turn(self, point: ResumePoint) -> None:
        self._ids_kept.discard(point.id)
        self._ids_to_go.discard(point.id)

    def blocks_of(self, point_id: int) -> list[int]:
        """Return all blocks that a request needs at a point: O(those)."""
        point = self._points.get(point_id)
        found = None if point is None else self.resume(point, point.num_tokens)
        return [] if found is None else [b for run in found.runs for b in run.blocks]

    def last_point(
        self, key: bytes, namespace: Namespace, num_tokens: int
    ) -> ResumePoint | None:
        """Return the last point among the first tokens of a key: O(L + d).

        Args:
            key: at least ``num_tokens`` tokens.
            namespace: of the key.
            num_tokens: to look at.
        """
        for edge, depth in reversed(self._paths.walk(key, namespace, num_tokens)):
            for point in reversed(edge.points):
                if point.num_tokens <= depth:
                    return point
        return None

    def points_on(self, key: bytes, namespace: Namespace, num_tokens: int) -> list[int]:
        """Return the ids of the points among the first tokens of a key: O(L + those).

        Args:
            key: at least ``num_tokens`` tokens.
            namespace: of the key.
            num_tokens: to look at.
        """
        path = self._paths.walk(key, namespace, num_tokens)
        return [p.id for edge, end in path for p in edge.points if p.num_tokens <= end]

    def note_parting(self, key: bytes, namespace: Namespace, num_tokens: int) -> None:
        """Note the tokens of a request that was admitted: O(L + d).

        Where a path goes on otherwise, the request parts from it: what both have used
        is no longer the affair of one of them; see ``let_go``. A request that goes on
        from the end of a path counts as the same session.

        Args:
            key: at least ``num_tokens`` tokens.
            namespace: of the key.
            num_tokens: of the request.
        """
        path = self._paths.walk(key, namespace, num_tokens)
        if not path:
            return
        edge, depth = path[-1]
        if depth < edge.end or edge.children:
            edge.shared_to = max(edge.shared_to, depth)
        if self._ids_to_go:
            self._use_again(path)

    def _use_again(self, path: list[tuple[Edge, int]]) -> None:
        """Give the points that a request has come upon the turn of all again."""
        for edge, depth in path:
            for point in edge.points:
                if point.turn < 0 and point.num_tokens <= depth:
                    self._move(point, 0)

    def note_shared(self, key: bytes, namespace: Namespace, num_tokens: int) -> None:
        """Note that the first tokens of a key are the affair of several: O(L + d)."""
        path = self._paths.walk(key, namespace, num_tokens)
        if path:
            edge, depth = path[-1]
            edge.shared_to = max(edge.shared_to, depth)

    def let_go(self, point_id: int, level: int = 0) -> list[int]:
        """Evict points that only one path has used before others: O(those, log n).

        From its last one back to where another path has parted from it, or is to. Not
        if another one goes on from its end. One that is used again is evicted in the
        order of all from then on.

        Args:
            point_id: of the last point of the path.
            level: from 0 to 15; the lower, the sooner.

        Returns:
            The ids of the points.
        """
        point = self._points.get(point_id)
        if point is None or point.edge.children or point is not point.edge.points[-1]:
            return []
        gone = []
        # Where an edge begins, paths part.
        for other in reversed(point.edge.points):
            is_shared = other.shared or other.num_tokens <= point.edge.shared_to
            if is_shared or other.pins:
                break
            self.unkeep(other.id)
            self._move(other, level - LEVELS)
            gone.append(other.id)
        return gone
