"""What an eviction policy is, and the registry of all of them.

Which blocks may go at all (idle, nothing cached below them) is the cache's knowledge. A
policy sorts blocks into *classes*. When a request ends, each *run* of its blocks, that
is blocks beside each other that were used as often, gets a class. Within a class blocks
leave in the order in which they were released, the deepest first. Each time room is
needed the policy picks the class that gives its oldest blocks. So time enters when
blocks leave, and nothing is ever sorted anew::

    class 0   [ oldest ........... youngest ]
    class 1   [ oldest ... youngest ]          pick() -> 1: its oldest run goes next
    class 2   [ ]

To choose well a policy may count what becomes of classes: the cache tells it of blocks
that were used again, after how many releases, and whether they were evicted by then.
"""

from typing import TypeVar

RANK_LIMIT = 1 << 60
"""Blocks are ranked by the number of releases before, which is less than this."""

NEVER = RANK_LIMIT << 3
"""In ``Queues.ranks``: the class has no block that may go."""

MAX_CLASSES = 254
"""Of a policy: what a byte holds, and more queues for what is not sorted."""


class Queues:
    """What may be evicted from each class, for ``EvictionPolicy.pick``.

    The oldest blocks are known well enough: one that was taken into use since the last
    release may still be named, and is passed over if it is picked.

    Attributes:
        now: ended requests so far.
        ranks: of the oldest block of each class that may go, ``NEVER`` if there is
            none: the lowest was released first.
        released: the value of ``now`` when that block was released.
        blocks: released blocks of each class, whether they may go yet or not.
        open: classes that have a block that may go.
        changed: classes whose oldest block is another one since the policy cleared
            this. All others are as they were.
    """

    __slots__ = ("blocks", "changed", "now", "open", "ranks", "released")

    def __init__(self, num_classes: int) -> None:
        self.now = 0
        self.ranks = [NEVER] * num_classes
        self.released = [0] * num_classes
        self.blocks = [0] * num_classes
        self.open: set[int] = set()
        self.changed: set[int] = set()

    def oldest(self) -> int:
        """Return the class whose oldest block was released first: O(classes)."""
        ranks = self.ranks
        return ranks.index(min(ranks))


class EvictionPolicy:
    """Sorts blocks into classes, and picks the class whose oldest blocks go next.

    One object serves one cache. All methods but ``label`` and ``pick`` are notes: they
    do nothing here. Each is called once for a run of blocks or for a request, never for
    a single block of many, and is to be O(1); ``pick`` may be O(classes).

    Attributes:
        name: what the option ``eviction`` calls the policy.
        num_classes: how many classes there are, up to ``MAX_CLASSES``. With one, the
            cache keeps no account of uses and calls no method.
        ghosts: for how many evicted blocks it is remembered that they were there, as a
            multiple of the cached ones. With 0, one that comes back is a new one.
        compares: whether it is compared with least recently used: told of what that
            would find, and of what it would still hold. That costs a few microseconds a
            request.
    """

    name: str
    num_classes: int = 1
    ghosts: int = 0
    compares: bool = False

    def label(self, uses: int, output_tokens: int, new_tokens: int) -> int:
        """Return the class of a run of blocks, as a request that used it ends. O(1).

        Args:
            uses: how many requests have used the run, this one included, as far as is
                remembered; 255 for more.
            output_tokens: that the request has generated.
            new_tokens: of its prompt that are new, as far as is remembered.
        """
        return 0

    def pick(self, queues: Queues) -> int:
        """Return the class to evict from: one that has a block that may go.

        O(classes), for each run of blocks that is evicted. By default the class whose
        oldest block was released first: least recently used.
        """
        return queues.oldest()

    def note_release(self, now: int) -> None:
        """Note that a request ends, before its blocks get classes.

        Args:
            now: ended requests so far, this one included.
        """

    def note_labelled(self, label: int, blocks: int) -> None:
        """Note that blocks have been released into a class."""

    def note_relabelled(self, label: int, age: int, blocks: int) -> None:
        """Note that blocks leave a class unjudged: others held them, or they are lost.

        Args:
            label: the class that they had.
            age: requests that have ended since they were released.
            blocks: how many.
        """

    def note_evicted(self, label: int, blocks: int) -> None:
        """Note that blocks were evicted, to be remembered for a while."""

    def note_reused(self, label: int, age: int, blocks: int, evicted: bool) -> None:
        """Note that a request asked for blocks again, which leaves their class.

        Args:
            label: the class that they had.
            age: requests that have ended since they were released.
            blocks: how many.
            evicted: whether they had been evicted, and are computed again.
        """

    def note_unused(self, label: int, age: int, blocks: int) -> None:
        """Note that evicted blocks are forgotten, for they were never used again.

        Args:
            label: the class that they had.
            age: requests that have ended since they were released.
            blocks: how many.
        """

    def note_exposed(self, label: int, blocks: int) -> None:
        """Note that blocks were evicted which least recently used would still hold.

        Only if the policy ``compares``, and had the choice.
        """

    def note_outcome(self, label: int, blocks: int, lost: bool) -> None:
        """Note that blocks are exposed no longer; only if the policy ``compares``.

        Args:
            label: the class that they had.
            blocks: how many.
            lost: whether they are asked for again; else least recently used would have
                evicted them by now.
        """

    def note_request(self, asked: int, found: int, lru: int, room: int) -> None:
        """Note what an admitted request found; only if the policy ``compares``.

        Args:
            asked: blocks of its prompt.
            found: those of them that were cached.
            lru: those that would be if least recently used had chosen so far.
            room: blocks that are cached.
        """

    def forget(self) -> None:
        """Forget all that was noted, for the cache was emptied."""


POLICIES: dict[str, type[EvictionPolicy]] = {}
"""The policies by name: the values of the option ``eviction``."""

_Policy = TypeVar("_Policy", bound=type[EvictionPolicy])


def register(policy: _Policy) -> _Policy:
    """Add a policy to ``POLICIES``, and return it: a class decorator.

    Raises:
        ValueError: its name is empty, or taken, or it has too many classes.
    """
    name = getattr(policy, "name", "")
    if not name:
        raise ValueError(f"{policy.__name__} needs a name to be chosen by")
    if name in POLICIES:
        raise ValueError(f"two eviction policies are called {name!r}")
    if not 1 <= policy.num_classes <= MAX_CLASSES:
        raise ValueError(
            f"eviction policy {name!r} has {policy.num_classes} classes; allowed: 1 to "
            f"{MAX_CLASSES}"
        )
    POLICIES[name] = policy
    return policy
