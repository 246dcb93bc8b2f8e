"""Hit density: what a block is likely to be worth for the time that it stays."""

from __future__ import annotations

from array import array

from vllm_radix.tree.eviction.base import NEVER, EvictionPolicy, Queues, register

_USES = (0, 0, 1, 2, 2, *(3,) * 4, *(4,) * 8)
"""Bin of a number of uses: 1, 2, 3-4, 5-8, 9-16; more are of bin 5."""
_USES_BINS = 6
_OUTPUT_TOKENS = 32, 256
_NEW_TOKENS = 1 << 10, 8 << 10
_REST = (len(_OUTPUT_TOKENS) + 1) * (len(_NEW_TOKENS) + 1)

BUCKETS = 16
"""Of ages: up to 4 releases, up to 8, up to 16, and so on."""
FIRST_BUCKET = 4
EPOCH = 128
"""Releases from one table to the next."""
EPOCHS = 128
"""For so many the blocks that were neither used nor forgotten are told apart."""
_DECAY = 15 / 16
_REQUESTS_OF_PRIOR = 16
"""Requests that all blocks count as beside a bin; bins count twice beside a class."""

_INFINITE = float("inf")
_KEEP = 0.5 ** (1 / 500)
"""Of the blocks asked for, from a request to the next."""
_ALLOWANCE = 0.0013
"""Share of all blocks asked for by which it may be behind least recently used."""
_REQUESTS_OF_DOUBT, _CACHES_OF_DOUBT = 16, 0.75
"""Exposed blocks, all lost, as which a class counts besides those that were judged."""
_LEAST_RISK = 0.1
"""An exposed block counts as so much of a lost one, however many came to nothing."""

_MIDDLES = (
    FIRST_BUCKET / 2,
    *(1.5 * FIRST_BUCKET * 2.0**bucket for bucket in range(BUCKETS - 1)),
)


def class_name(label: int) -> str:
    """Return what a class stands for, for reports."""
    at, new = divmod(label, 3)
    uses, output = divmod(at, 3)
    return (
        f"{('1', '2', '3-4', '5-8', '9-16', '17+')[uses]} uses, "
        f"{('< 32', '< 256', '256+')[output]} tokens generated, "
        f"{('< 1k', '< 8k', '8k+')[new]} new"
    )


_BUCKETS = tuple(min(BUCKETS - 1, max(0, bits - 2)) for bits in range(65))
"""The bucket of an age, by the bits that it has."""


def bucket_of(age: int) -> int:
    """Return the bucket of an age. O(1)."""
    return _BUCKETS[age.bit_length()]


@register
class HitDensity(EvictionPolicy):
    """Evicts the blocks that promise the fewest hits for the time that they stay.

    Classes are how often a run was used (6 bins), how much its last request generated
    (3) and how much of that request's prompt was new (3). For each class and age it
    counts what is reused and what is not, of cached and of evicted blocks; the density
    of hits is the Gittins index of that: the best that the chance of a reuse over some
    time to come, over the block-time until then, can be. A class of which little is
    known counts as its bin of uses, and that as all blocks, whose chance is the same in
    each octave of age. With that alone the order is least recently used.

    A guard bounds what that can lose against least recently used. What the rule has
    found more is its credit, with an allowance of a share of what was asked for, at
    most one cache. What it has evicted and least recently used would still hold is at
    stake: by class, times the share of such blocks that were asked for again, which is
    all of them while few were judged. While more is at stake than there is credit,
    blocks leave in the order of least recently used.

    After Beckmann et al., "LHD: improving cache hit rate by maximizing hit density",
    2018.
    """

    name = "hit-density"
    num_classes = _USES_BINS * _REST
    ghosts = 8
    compares = True

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all that was learned: least recently used, for a start."""
        classes = self.num_classes
        self.hits = array("d", bytes(8 * classes * BUCKETS))
        self.ends = array("d", bytes(8 * classes * BUCKETS))
        # Blocks that were neither reused nor forgotten, by when they were released:
        # classes beside each other for each epoch of a ring, and those of before.
        self.waiting = array("i", bytes(4 * classes * EPOCHS))
        self.waiting_longer = array("d", bytes(8 * classes))
        self._now = 0
        self._requests = 1.0
        self._scores = [_INFINITE] * classes
        self._scored_at = -1
        self.asked = 0.0
        # The guard: exposed blocks by class, if there are any; those judged and lost.
        self.credit = self.at_stake = 0.0
        self.exposed: dict[int, int] = {}
        self._judged, self._lost = [0.0] * classes, [0.0] * classes
        self._doubt = 1.0
        self._learn()

    # -- classes ---------------------------------------------------------------

    def label(self, uses: int, output_tokens: int, new_tokens: int) -> int:
        """Return the class: bins of uses, output tokens and new tokens. O(1)."""
        at = _USES[uses] if uses < len(_USES) else _USES_BINS - 1
        low, high = _OUTPUT_TOKENS
        at = 3 * at + (output_tokens >= low) + (output_tokens >= high)
        low, high = _NEW_TOKENS
        return 3 * at + (new_tokens >= low) + (new_tokens >= high)

    def pick(self, queues: Queues) -> int:
        """Return the class whose oldest block has the lowest density.

        O(classes) comparisons; densities are computed for those classes whose oldest
        block has changed, and for all after a release.
        """
        if self.at_stake >= self.credit:  # guarded, without the call
            return queues.oldest()
        scores, ranks = self._scores, queues.ranks
        now, released, density = queues.now, queues.released, self.density
        stale = queues.changed
        if self._scored_at != now:
            self._scored_at = now
            stale |= queues.open
        for label in stale:
            if ranks[label] == NEVER:
                scores[label] = _INFINITE
            else:
                scores[label] = density(label, now - released[label])
        queues.changed.clear()
        return scores.index(min(scores))

    def density(self, label: int, age: int) -> float:
        """Return the density of a class at an age: a line between two buckets. O(1)."""
        at = _BUCKETS[age.bit_length()]
        if age < _MIDDLES[at]:
            if not at:
                # Falling, however little, so that the older one goes.
                return self._densities[label][0] * (1.01 - 0.005 * age)
            at -= 1
        elif at == BUCKETS - 1:
            return self._densities[label][at] * _MIDDLES[at] / age
        middle = _MIDDLES[at]
        return self._densities[label][at] + self._slopes[label][at] * (age - middle)

    # -- notes -----------------------------------------------------------------

    def note_release(self, now: int) -> None:
        """Let time pass; every 128 releases make the table anew: O(classes)."""
        self._now = now
        if now % EPOCH:
            return
        self._learn()
        classes, slot = self.num_classes, now // EPOCH % EPOCHS
        for at in range(slot * classes, (slot + 1) * classes):
            if self.waiting[at]:
                self.waiting_longer[at - slot * classes] += self.waiting[at]
                self.waiting[at] = 0

    def note_labelled(self, label: int, blocks: int) -> None:
        """Count blocks as waiting."""
        epoch = self._now // EPOCH % EPOCHS
        self.waiting[epoch * self.num_classes + label] += blocks

    def note_relabelled(self, label: int, age: int, blocks: int) -> None:
        """Count blocks as waiting no more."""
        epoch = (self._now - age) // EPOCH
        if self._now // EPOCH - epoch < EPOCHS:
            self.waiting[epoch % EPOCHS * self.num_classes + label] -= blocks
        else:
            left = self.waiting_longer[label] - blocks
            self.waiting_longer[label] = max(0.0, left)

    def note_reused(self, label: int, age: int, blocks: int, evicted: bool) -> None:
        """Count a reuse at an age."""
        self.hits[label * BUCKETS + bucket_of(age)] += blocks
        self.note_relabelled(label, age, blocks)

    def note_unused(self, label: int, age: int, blocks: int) -> None:
        """Count an end at an age."""
        self.ends[label * BUCKETS + bucket_of(age)] += blocks
        self.note_relabelled(label, age, blocks)

    # -- the guard -------------------------------------------------------------

    @property
    def guarded(self) -> bool:
        """Whether too much is at stake: the order is that of least recently used."""
        return self.at_stake >= self.credit

    def _risk(self, label: int) -> float:
        """Return as how much of a lost block an exposed one of a class counts. O(1)."""
        lost, judged = (
            self._lost[label] + self._doubt,
            self._judged[label] + self._doubt,
        )
        return max(_LEAST_RISK, lost / judged)

    def note_exposed(self, label: int, blocks: int) -> None:
        """Count blocks as at stake. O(1)."""
        self.exposed[label] = self.exposed.get(label, 0) + blocks
        self.at_stake += self._risk(label) * blocks

    def note_outcome(self, label: int, blocks: int, lost: bool) -> None:
        """Count blocks as at stake no more, and what became of them. O(1)."""
        left = self.exposed.pop(label) - blocks
        if left:
            self.exposed[label] = left
        self._judged[label] += blocks
        if lost:
            self._lost[label] += blocks

    def note_request(self, asked: int, found: int, lru: int, room: int) -> None:
        """Count the credit, and what is at stake: O(classes that are exposed)."""
        self.credit = min(room, self.credit + found - lru + _ALLOWANCE * asked)
        self.asked = _KEEP * self.asked + asked
        self._requests = _KEEP * self._requests + 1.0
        doubt = _REQUESTS_OF_DOUBT * max(1.0, self.asked / self._requests)
        self._doubt = doubt + _CACHES_OF_DOUBT * room
        judged, lost, at_stake = self._judged, self._lost, 0.0
        doubt = self._doubt
        for label, blocks in self.exposed.items():
            # As _risk, which is a call.
            risk = (lost[label] + doubt) / (judged[label] + doubt)
            at_stake += blocks * (risk if risk > _LEAST_RISK else _LEAST_RISK)
        self.at_stake = at_stake

    # -- learning --------------------------------------------------------------

    def _learn(self) -> None:
        """Make the table of densities from what was counted, and age the counts."""
        # Imported late, so that names of policies can be listed without.
        from vllm_radix.tree.eviction.density import table

        prior = _REQUESTS_OF_PRIOR * max(1.0, self.asked / self._requests)
        self._densities: list[list[float]]
        self._slopes: list[list[float]]
        self._densities, self._slopes = table(
            self.hits,
            self.ends,
            self.waiting,
            self.waiting_longer,
            newest=(self._now // EPOCH - 1) % EPOCHS,
            bins=_USES_BINS,
            prior=prior,
            decay=_DECAY,
        )
        self._judged = [_DECAY * blocks for blocks in self._judged]
        self._lost = [_DECAY * blocks for blocks in self._lost]
        self._scored_at = -1
