"""The waiting requests as arrays, for orders that score all of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_radix.policy.waiting_tree import WaitingTree

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass
class QueueView:
    """The waiting requests as arrays, in the order of their tokens.

    Attributes:
        shared: the blocks that each shares with the one before.
        cached: the blocks of its prefix that are cached, or will be when those
            planned before are admitted.
        blocks: the blocks of its prompt.
        tokens: the tokens of its prompt.
        arrival: its place in the order of arrival.
        age: the work done since it arrived, in tokens.
        selectable: whether it may be planned.
        planned: whether it is planned already, or computes.
        block_size: tokens in a block.
    """

    shared: Ints
    cached: Ints
    blocks: Ints
    tokens: Ints
    arrival: Ints
    age: Ints
    selectable: Bools
    planned: Bools
    block_size: int

    def at(self, places: list[int]) -> "QueueView":
        """Return some of the requests; what neighbours share is lost."""
        return QueueView(
            np.zeros(len(places), np.int64),
            self.cached[places],
            self.blocks[places],
            self.tokens[places],
            self.arrival[places],
            self.age[places],
            self.selectable[places],
            self.planned[places],
            self.block_size,
        )

    @property
    def uncached(self) -> Ints:
        """Tokens to compute; at least one."""
        left: Ints = self.tokens - self.cached * self.block_size
        return np.maximum(left, 1).astype(np.int64)


def view_of_queue(waiting: WaitingTree, work: int, block_size: int) -> QueueView:
    """Return the arrays of a tree of waiting requests: O(n).

    Args:
        waiting: the requests; those that compute already are not selectable.
        work: the work done so far, in tokens.
        block_size: tokens in a block.
    """
    entries = waiting.entries()

    computing = np.array([entry.computing for entry in entries], np.bool_)

    def ints(values: list[int]) -> Ints:
        return np.array(values, np.int64)

    return QueueView(
        shared=ints(waiting.shared()),
        cached=ints([entry.cached for entry in entries]),
        blocks=ints([entry.blocks for entry in entries]),
        tokens=ints([entry.tokens for entry in entries]),
        arrival=ints([entry.arrival for entry in entries]),
        age=work - ints([entry.arrived_at_work for entry in entries]),
        selectable=~computing,
        planned=computing,
        block_size=block_size,
    )
