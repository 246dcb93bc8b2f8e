"""The reason why a request cannot go on later than it does, in a tree of points."""

from collections import Counter, OrderedDict
from hashlib import blake2b
from itertools import islice

from vllm_radix.tree.debug.miss import Miss
from vllm_radix.tree.prefix_cache import Namespace
from vllm_radix.tree.resume.paths import Paths
from vllm_radix.tree.token_keys import BYTES_PER_TOKEN

_CAPACITY = 4096
_MAX_NAMESPACES = 64


class EvictedPoints:
    """Remembers which paths had a resume point that was evicted.

    By a digest of all tokens before it, so that an answer is never about another
    path. A missing one means unknown.

    Args:
        capacity: points that are remembered; those noted longest ago are forgotten.

    Attributes:
        now: the time that evictions are stamped with, set by the caller.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self.now = 0.0
        self._capacity = capacity
        self._times: OrderedDict[tuple[Namespace, int, bytes], float] = OrderedDict()
        self._places: Counter[int] = Counter()

    def note(self, key: bytes, namespace: Namespace) -> None:
        """Remember that the point after a key is evicted: O(its tokens)."""
        num_tokens = len(key) // BYTES_PER_TOKEN
        mark = namespace, num_tokens, blake2b(key, digest_size=16).digest()
        if self._times.pop(mark, None) is None:
            self._places[num_tokens] += 1
        self._times[mark] = self.now
        if len(self._times) > self._capacity:
            (_, num_tokens, _), _ = self._times.popitem(last=False)
            self._places[num_tokens] -= 1
            if not self._places[num_tokens]:
                del self._places[num_tokens]

    def last(
        self, key: bytes, namespace: Namespace, after: int, limit: int
    ) -> tuple[int, float] | None:
        """Return the last point on a path that was evicted, and when.

        O(tokens), and O(places that are remembered).

        Args:
            key: at least ``limit`` tokens.
            namespace: of the key.
            after: it lies after more tokens than these.
            limit: and after no more than these.

        Returns:
            The tokens before it, and the time; None if none is known.
        """
        found = None
        digest, done = blake2b(digest_size=16), 0
        for place in sorted(n for n in self._places if after < n <= limit):
            digest.update(key[done * BYTES_PER_TOKEN : place * BYTES_PER_TOKEN])
            done = place
            when = self._times.get((namespace, place, digest.digest()))
            if when is not None:
                found = place, when
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._times.clear()
        self._places.clear()


def explain(
    paths: Paths,
    history: EvictedPoints | None,
    key: bytes,
    namespace: Namespace,
    limit: int,
    found: int,
    least: int,
    grain: int,
) -> Miss:
    """See ``ResumeTree.explain``.

    Args:
        paths: of the tree.
        history: what was evicted, if anything is kept of it.
        key: the tokens that were looked for.
        namespace: where.
        limit: most tokens to match.
        found: tokens after which a request can go on.
        least: fewest tokens that are worth a point.
        grain: points lie at multiples of so many tokens.
    """
    path = paths.walk(key, namespace, limit)
    depth = path[-1][1] if path else 0
    if found >= limit:
        return Miss("none", limit)
    gone = history.last(key, namespace, found, limit) if history is not None else None
    if gone is not None and gone[0] > depth:
        return Miss("evicted", depth, gone[1])
    # A few tokens that are shared by chance are no reason, unless they are all.
    worth_it = depth // grain * grain - found >= least
    if gone is not None or worth_it or depth >= limit:
        return Miss("unkept", found, None if gone is None else gone[1])
    if not found:
        for other in islice(paths.roots, _MAX_NAMESPACES):
            there = paths.walk(key, other, limit) if other != namespace else None
            if there and there[-1][1] >= least:
                return Miss("apart", 0)
    if not path:
        return Miss("unseen", 0)
    edge = path[-1][0]
    goes_on = depth < edge.end or bool(edge.children)
    return Miss("diverged" if goes_on else "unseen", depth)
