"""What an order of eviction has put at stake against least recently used.

A block is exposed if it was evicted while least recently used would still hold it. It
leaves that state in one of two ways: it is asked for again, which is a hit lost, or the
time comes at which least recently used would have evicted it too, and nothing was lost.

Time passes when a request is admitted. What its own blocks push out is exposed until
the next one comes, even if least recently used would push it out as well.
"""

from vllm_radix.tree.eviction import EvictionPolicy


class Exposure:
    """Follows exposed blocks, and tells a policy what becomes of them.

    Costs are per run of blocks; when time passes, O(1) for each ended request.

    Args:
        policy: is told.

    Attributes:
        horizon: what was last touched at this time or before, least recently used would
            have evicted.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.horizon = -1
        # Exposed blocks by class, for each time at which they were touched last.
        self._by_clock: dict[int, dict[int, int]] = {}

    def blocks(self, label: int) -> int:
        """Return how many blocks of a class are exposed: O(times), for checks."""
        return sum(by_class.get(label, 0) for by_class in self._by_clock.values())

    def add(self, clock: int, label: int, blocks: int) -> None:
        """Note that the policy has had blocks evicted. O(1).

        Args:
            clock: when they were touched last.
            label: their class.
            blocks: how many.
        """
        if clock <= self.horizon:
            return
        by_class = self._by_clock.setdefault(clock, {})
        by_class[label] = by_class.get(label, 0) + blocks
        self.policy.note_exposed(label, blocks)

    def lose(self, clock: int, label: int, blocks: int) -> None:
        """Note that evicted blocks are asked for again. O(1).

        Args:
            clock: when they were touched last.
            label: their class.
            blocks: how many.
        """
        by_class = self._by_clock.get(clock)
        # Others that were touched then may have gone otherwise than by the policy.
        lost = min(blocks, by_class.get(label, 0)) if by_class else 0
        if by_class and lost:
            by_class[label] -= lost
            self.policy.note_outcome(label, lost, True)

    def pass_time(self, horizon: int) -> None:
        """Let least recently used evict what was touched last at a time or before.

        O(times in between), and O(classes) for each that has exposed blocks. Time does
        not run backwards: what has passed stays judged if the cache becomes larger.
        """
        for clock in range(self.horizon + 1, horizon + 1):
            for label, blocks in self._by_clock.pop(clock, {}).items():
                if blocks:
                    self.policy.note_outcome(label, blocks, False)
        self.horizon = max(self.horizon, horizon)
