"""What clients ask to be kept, within a quota and for a time.

A tree keeps a path by its end: the last block, or a resume point. Below, an *end* is
either.
"""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from vllm_radix.metrics.series import WISH_ENDS
from vllm_radix.tree import RadixTree

_PATHS = 8
"""Block ids that the paths of all wishes may list, as a multiple of the quota."""


class KeepingTree(Protocol):
    """What keeps a path; see ``RadixTree`` and ``ResumeTree``."""

    on_unkept: Callable[[int], None] | None

    def keep(self, end: int, level: int = 0, /) -> bool:
        """Evict an end after others; return whether it is kept."""

    def unkeep(self, end: int, /) -> None:
        """Evict an end in the order of all again, if it was kept."""


class Wish(NamedTuple):
    """A wish of a tenant that a path be kept.

    Attributes:
        end: of the path.
        tenant: whose wish it is.
        level: the higher, the later its blocks go.
        until: when it ends, in seconds.
        once: it ends when the path is used again, too.
        path: the blocks that it takes.
    """

    end: int
    tenant: str
    level: int
    until: float
    once: bool
    path: array  # type: ignore[type-arg]

    @property
    def place(self) -> tuple[int, float, int]:
        """Its place among those of its tenant; the last gives way first."""
        return -self.level, self.until, self.end


class _Account:
    """What one tenant has asked for."""

    def __init__(self) -> None:
        self.covers: Counter[int] = Counter()
        self.places: list[tuple[int, float, int]] = []


class Wishes:
    """Keeps what tenants ask for in the tree, as far as the quota goes.

    A tenant is charged for each block that its wishes cover, once. If all together are
    charged for more than the quota, the tenant that is charged for most gives way: of
    its wishes those of the lowest level, and of these the one that lasts longest. So a
    tenant alone may have the whole quota, several have equal shares if they want them,
    and who asks for too much loses wishes of its own. O(blocks of the path), and
    O(wishes) in C, for each wish that comes or goes.

    Args:
        tree: the prefix cache; its ``on_unkept`` is taken, and ``on_kept_moved``.
        quota: blocks that may be kept.

    Attributes:
        charged: blocks that tenants are charged for.
        ended: how many wishes hold no longer, by why; see ``WISH_ENDS``. One that the
            same tenant replaces is not counted.
    """

    def __init__(self, tree: KeepingTree, quota: int) -> None:
        self._tree = tree
        self._quota = quota
        self.charged = 0
        self.ended = dict.fromkeys(WISH_ENDS, 0)
        self._listed = 0
        self._wishes: dict[int, dict[str, Wish]] = {}
        self._accounts: dict[str, _Account] = {}
        self._ends: list[tuple[float, int, str]] = []
        self._once: set[int] = set()
        tree.on_unkept = self.forget
        if isinstance(tree, RadixTree):
            # A block may be computed anew; a resume point is there or not.
            tree.on_kept_moved = self.move

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def num_active(self) -> int:
        """How many wishes hold."""
        return len(self)

    def charged_to(self, tenant: str) -> int:
        """Return the blocks that a tenant is charged for."""
        account = self._accounts.get(tenant)
        return len(account.covers) if account is not None else 0

    def add(
        self,
        tenant: str,
        path: Sequence[int],
        level: int,
        until: float,
        once: bool,
        end: int | None = None,
    ) -> bool:
        """Keep a path until a time, whatever the tenant asked of its end before.

        Args:
            tenant: who asks.
            path: the cached blocks that it takes.
            level: from 0 to 15; the higher, the later its blocks go.
            until: when it is over.
            once: it is over when the path is used again, too.
            end: of the path; None for its last block.

        Returns:
            Whether it is kept: the quota may not allow it.
        """
        if not path or len(path) > self._quota:
            self.ended["refused"] += 1
            return False
        end = path[-1] if end is None else end
        before = self._wishes.get(end, {}).get(tenant)
        if before is not None:
            self._drop(before)
        if not self._tree.keep(end, level):
            self.ended["refused"] += 1
            return False
        wish = Wish(end, tenant, level, until, once, array("i", path))
        self._file(wish)
        self._show(end)
        while self.charged > self._quota or self._listed > _PATHS * self._quota:
            largest = max(self._accounts, key=self.charged_to)
            place = self._accounts[largest].places[-1]
            first = self._wishes[place[2]][largest]
            self._drop(first, "refused" if first is wish else "quota")
        return tenant in self._wishes.get(end, {})

    def expire(self, now: float) -> None:
        """Drop the wishes that are over: O(1) if none is."""
        while self._ends and self._ends[0][0] <= now:
            _, end, tenant = self._ends[0]
            self._drop(self._wishes[end][tenant], "time")

    def note_use(self, ends: Collection[int]) -> None:
        """Drop the wishes that end when a request uses their path: O(ends) in C."""
        for end in self._once.intersection(ends) if self._once else ():
            for wish in tuple(self._wishes[end].values()):
                if wish.once:
                    self._drop(wish, "used")

    def forget(self, end: int) -> None:
        """Drop what is asked of an end, for the tree does not keep it any more."""
        for wish in tuple(self._wishes.get(end, {}).values()):
            self._drop(wish, "gone")

    def clear(self) -> None:
        """Drop all wishes, for the cache was emptied."""
        for here in tuple(self._wishes.values()):
            for wish in tuple(here.values()):
                self._drop(wish, "reset")

    def move(self, block: int, other: int) -> None:
        """Ask of another block what is asked of one, for it has taken its place."""
        for wish in tuple(self._wishes.get(block, {}).values()):
            self._unfile(wish)
            path = wish.path[:-1] + array("i", [other])
            self._file(wish._replace(end=other, path=path))

    def _drop(self, wish: Wish, why: str = "") -> None:
        if why:
            self.ended[why] += 1
        self._unfile(wish)
        if wish.end in self._wishes:
            self._show(wish.end)
        else:
            self._tree.unkeep(wish.end)

    def _file(self, wish: Wish) -> None:
        self._wishes.setdefault(wish.end, {})[wish.tenant] = wish
        account = self._accounts.setdefault(wish.tenant, _Account())
        self.charged -= len(account.covers)
        account.covers.update(wish.path)
        self.charged += len(account.covers)
        self._listed += len(wish.path)
        insort(account.places, wish.place)
        insort(self._ends, (wish.until, wish.end, wish.tenant))
        if wish.once:
            self._once.add(wish.end)

    def _unfile(self, wish: Wish) -> None:
        here = self._wishes[wish.end]
        del here[wish.tenant]
        account = self._accounts[wish.tenant]
        del account.places[bisect_left(account.places, wish.place)]
        covers = account.covers
        self.charged -= len(covers)
        for one in wish.path:
            covers[one] -= 1
            if not covers[one]:
                del covers[one]
        self.charged += len(covers)
        self._listed -= len(wish.path)
        if not account.places:
            del self._accounts[wish.tenant]
        over = wish.until, wish.end, wish.tenant
        del self._ends[bisect_left(self._ends, over)]
        if not any(other.once for other in here.values()):
            self._once.discard(wish.end)
        if not here:
            del self._wishes[wish.end]

    def _show(self, end: int) -> None:
        """Keep an end as high as anybody asks for."""
        self._tree.keep(end, max(w.level for w in self._wishes[end].values()))
