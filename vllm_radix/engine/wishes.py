"""What clients ask to be kept, within a quota and for a time."""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

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
        tree: the prefix cache; its ``on_unkept`` is taken.
        quota: blocks that may be kept.

    Attributes:
        charged: blocks that tenants are charged for.
    """

    def __init__(self, tree: RadixTree, quota: int) -> None:
        self._tree = tree
        self._quota = quota
        self.charged = 0
        self._listed = 0
        self._wishes: dict[int, dict[str, Wish]] = {}
        self._accounts: dict[str, _Account] = {}
        self._ends: list[tuple[float, int, str]] = []
        self._once: set[int] = set()
        tree.on_unkept = self.forget

    def __len__(self) -> int:
        return len(self._ends)

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
            return False
        block = path[-1]
        before = self._wishes.get(block, {}).get(tenant)
        if before is not None:
            self._drop(before)
        if not self._tree.keep(block, level):
            return False
        wish = Wish(block, tenant, level, until, once, array("i", path))
        self._wishes.setdefault(block, {})[tenant] = wish
        account = self._accounts.setdefault(tenant, _Account())
        self.charged -= len(account.covers)
        account.covers.update(wish.path)
        self.charged += len(account.covers)
        self._listed += len(wish.path)
        insort(account.places, wish.place)
        insort(self._ends, (until, block, tenant))
        if once:
            self._once.add(block)
        self._show(block)
        while self.charged > self._quota or self._listed > _PATHS * self._quota:
            largest = max(self._accounts, key=self.charged_to)
            place = self._accounts[largest].places[-1]
            self._drop(self._wishes[place[2]][largest])
        return tenant in self._wishes.get(block, {})

    def expire(self, now: float) -> None:
        """Drop the wishes that are over: O(1) if none is."""
        while self._ends and self._ends[0][0] <= now:
            _, block, tenant = self._ends[0]
            self._drop(self._wishes[block][tenant])

    def note_use(self, blocks: Collection[int]) -> None:
        """Drop the wishes that end when a request uses their path: O(blocks) in C."""
        for block in self._once.intersection(blocks) if self._once else ():
            for wish in tuple(self._wishes[block].values()):
                if wish.once:
                    self._drop(wish)

    def forget(self, block: int) -> None:
        """Drop what is asked of a block, for the tree does not keep it any more."""
        for wish in tuple(self._wishes.get(block, {}).values()):
            self._drop(wish)

    def clear(self) -> None:
        """Drop all wishes."""
        for block in tuple(self._wishes):
            self.forget(block)

    def _drop(self, wish: Wish) -> None:
        block, tenant = wish.block, wish.tenant
        here = self._wishes[block]
        del here[tenant]
        account = self._accounts[tenant]
        del account.places[bisect_left(account.places, wish.place)]
        self.charged -= len(account.covers)
        covers = account.covers
        for one in wish.path:
            covers[one] -= 1
            if not covers[one]:
                del covers[one]
        self.charged += len(covers)
        self._listed -= len(wish.path)
        if not account.places:
            del self._accounts[tenant]
        del self._ends[bisect_left(self._ends, (wish.until, block, tenant))]
        if not any(other.once for other in here.values()):
            self._once.discard(block)
        if here:
            self._show(block)
        else:
            del self._wishes[block]
            self._tree.unkeep(block)

    def _show(self, block: int) -> None:
        """Keep a block as high as anybody asks for."""
        self._tree.keep(block, max(w.level for w in self._wishes[block].values()))
