"""What clients ask to be kept, within a quota and for a time."""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_radix.metrics.series import WISH_ENDS
from vllm_radix.tree import RadixTree

_PATHS = 8
"""Block ids that the paths of all wishes may list, as a multiple of the quota."""


class Wish(NamedTuple):
    """A wish of a tenant that the path that ends with a block be kept.

    Attributes:
        block: the end.
        tenant: whose wish it is.
        level: the higher, the later its blocks go.
        until: when it ends, in seconds.
        once: it ends when the path is used again, too.
        path: the blocks of the path.
    """

    block: int
    tenant: str
    level: int
    until: float
    once: bool
    path: array  # type: ignore[type-arg]

    @property
    def place(self) -> tuple[int, float, int]:
        """Its place among those of its tenant; the last gives way first."""
        return -self.level, self.until, self.block


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
        tree: the prefix cache; its ``on_unkept`` and ``on_kept_moved`` are taken.
        quota: blocks that may be kept.

    Attributes:
        charged: blocks that tenants are charged for.
        ended: how many wishes hold no longer, by why; see ``WISH_ENDS``. One that the
            same tenant replaces is not counted.
    """

    def __init__(self, tree: RadixTree, quota: int) -> None:
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
        self, tenant: str, path: Sequence[int], level: int, until: float, once: bool
    ) -> bool:
        """Keep a path until a time, whatever the tenant asked of its end before.

        Args:
            tenant: who asks.
            path: blocks that are cached, from the root on.
            level: from 0 to 15; the higher, the later its blocks go.
            until: when it is over.
            once: it is over when the path is used again, too.

        Returns:
            Whether it is kept: the quota may not allow it.
        """
        if not path or len(path) > self._quota:
            self.ended["refused"] += 1
            return False
        block = path[-1]
        before = self._wishes.get(block, {}).get(tenant)
        if before is not None:
            self._drop(before)
        if not self._tree.keep(block, level):
            self.ended["refused"] += 1
            return False
        wish = Wish(block, tenant, level, until, once, array("i", path))
        self._file(wish)
        self._show(block)
        while self.charged > self._quota or self._listed > _PATHS * self._quota:
            largest = max(self._accounts, key=self.charged_to)
            place = self._accounts[largest].places[-1]
            first = self._wishes[place[2]][largest]
            self._drop(first, "refused" if first is wish else "quota")
        return tenant in self._wishes.get(block, {})

    def expire(self, now: float) -> None:
        """Drop the wishes that are over: O(1) if none is."""
        while self._ends and self._ends[0][0] <= now:
            _, block, tenant = self._ends[0]
            self._drop(self._wishes[block][tenant], "time")

    def note_use(self, blocks: Collection[int]) -> None:
        """Drop the wishes that end when a request uses their path: O(blocks) in C."""
        for block in self._once.intersection(blocks) if self._once else ():
            for wish in tuple(self._wishes[block].values()):
                if wish.once:
                    self._drop(wish, "used")

    def forget(self, block: int) -> None:
        """Drop what is asked of a block, for the tree does not keep it any more."""
        for wish in tuple(self._wishes.get(block, {}).values()):
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
            self._file(wish._replace(block=other, path=path))

    def _drop(self, wish: Wish, why: str = "") -> None:
        if why:
            self.ended[why] += 1
        self._unfile(wish)
        if wish.block in self._wishes:
            self._show(wish.block)
        else:
            self._tree.unkeep(wish.block)

    def _file(self, wish: Wish) -> None:
        self._wishes.setdefault(wish.block, {})[wish.tenant] = wish
        account = self._accounts.setdefault(wish.tenant, _Account())
        self.charged -= len(account.covers)
        account.covers.update(wish.path)
        self.charged += len(account.covers)
        self._listed += len(wish.path)
        insort(account.places, wish.place)
        insort(self._ends, (wish.until, wish.block, wish.tenant))
        if wish.once:
            self._once.add(wish.block)

    def _unfile(self, wish: Wish) -> None:
        here = self._wishes[wish.block]
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
        end = wish.until, wish.block, wish.tenant
        del self._ends[bisect_left(self._ends, end)]
        if not any(other.once for other in here.values()):
            self._once.discard(wish.block)
        if not here:
            del self._wishes[wish.block]

    def _show(self, block: int) -> None:
        """Keep a block as high as anybody asks for."""
        self._tree.keep(block, max(w.level for w in self._wishes[block].values()))
