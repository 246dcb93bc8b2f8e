"""How many tokens blocks have room for, where that depends on the request."""

from collections.abc import Sequence

from vllm_radix.tree.resume import Component, State

_TYPICAL_TOKENS = 1024
"""Tokens of a request, before any came."""


class TypicalRequest:
    """The length of requests as they come, and how many blocks such a one holds.

    Args:
        components: of the cache groups.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = components
        self._typical_tokens = 0.0

    def note_arrival(self, num_tokens: int) -> None:
        """Note the length of a request that came."""
        typical = self._typical_tokens or num_tokens
        self._typical_tokens = typical + (num_tokens - typical) / 16

    def tokens_in(self, blocks: int) -> int:
        """Return how many tokens blocks have room for: O(groups)."""
        tokens = int(self._typical_tokens or _TYPICAL_TOKENS)
        return int(blocks * tokens / self._blocks_for(tokens))

    def _blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a request of so many tokens holds."""
        needed = 0
        for component in self._components:
            end = component.end_block(num_tokens)
            needed += end - component.first_block(num_tokens)
            # The state that a step begins with, beside the one it ends with.
            needed += isinstance(component, State) and end > 1
        # Of chunks alone: none is held where one begins.
        return max(1, needed)
