"""A plan that no request can be admitted, and when it has to be made again."""

from collections.abc import Sequence

from vllm_radix.policy import STEP, StepCapacity

REPLAN_AFTER_WORK = 16 * STEP
"""Work after which a plan is made again, though nothing but time has changed."""


class StuckPlan:
    """What must stay as it is for a plan to be that no request can be admitted.

    Args:
        plan: ids, as given to the queue.
        need: free blocks that its first request needs.
        gate: blocks beside the needed ones that let the oldest go instead.
        changes: changes of the waiting requests and their look-ups so far.
        work: done so far.
    """

    def __init__(
        self, plan: Sequence[str], need: int, gate: int, changes: int, work: int
    ) -> None:
        self.plan = plan
        self._need = need
        self._gate = gate
        self._changes = changes
        self._period = work // REPLAN_AFTER_WORK

    def holds(self, capacity: StepCapacity, changes: int, work: int) -> bool:
        """Return whether it is still so, O(1)."""
        return (
            changes == self._changes
            and work // REPLAN_AFTER_WORK == self._period
            and capacity.blocks < self._need
            and capacity.blocks - capacity.needed < self._gate
        )
