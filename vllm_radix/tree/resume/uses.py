"""Which blocks a tree of resume points has cached, and which of them are idle."""

from collections.abc import Callable, Iterable

from vllm_radix.tree.resume.paths import Paths


class BlockUses:
    """Counts of what needs each block: points that keep it, and the path it lies on.

    Args:
        paths: of the tree; their counts of idle blocks are kept up to date.
        on_release: called when a block becomes idle.

    Attributes:
        idle: cached blocks that no request uses.
    """

    def __init__(self, paths: Paths, on_release: Callable[[], None]) -> None:
        self._paths = paths
        self._on_release = on_release
        self._counts: dict[int, int] = {}
        self.idle = paths.idle

    def __contains__(self, block: object) -> bool:
        return block in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def count(self, block: int) -> int:
        """Return how many points and paths need a block."""
        return self._counts.get(block, 0)

    def add(self, blocks: Iterable[int]) -> list[int]:
        """Count one more use of each block; return those that were not cached."""
        new = []
        for block in blocks:
            uses = self._counts.get(block, 0)
            self._counts[block] = uses + 1
            if not uses:
                new.append(block)
        return new

    def drop(self, blocks: Iterable[int]) -> list[int]:
        """Take back one use of each block; return those that went and were idle."""
        freed = []
        for block in blocks:
            self._counts[block] -= 1
            if not self._counts[block]:
                del self._counts[block]
                self._paths.drop_window(block)
                if block in self.idle:
                    self.idle.remove(block)
                    freed.append(block)
        return freed

    def acquire(self, blocks: Iterable[int]) -> None:
        """Make idle blocks held, O(1) each. Others are left alone."""
        for block in blocks:
            if block in self.idle:
                self.idle.remove(block)
                self._count(block, -1)

    def release(self, blocks: Iterable[int]) -> None:
        """Make held blocks idle, O(1) each. Others are left alone."""
        for block in blocks:
            if block in self._counts and block not in self.idle:
                self.idle.add(block)
                self._count(block, 1)
                self._on_release()

    def _count(self, block: int, step: int) -> None:
        edge = self._paths.edge_of.get(block)
        if edge is not None:
            edge.num_idle += step
