"""What is sent: forests of turns.

A turn's prompt is what was said before it on its path, model's answers included, and
its own tokens; it is sent when its parent's answer is complete. So chat is a forest of
chains, tree search one of branching trees, and a batch of independent requests one of
single nodes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Turn:
    """One request: what it adds to the path so far, and how much to generate.

    Attributes:
        tokens: added to what was said before on the path.
        max_tokens: to generate, exactly.
        children: turns sent when this one is answered.
        arrival: seconds after the start before which it is not sent.
        delay: seconds after the answer of its parent before which it is not sent.
        tenant: who sends it; empty where that does not matter.
        priority: of vLLM's priority policy.
        salt: of the cache; None shares with all that have none.
        whole: whether ``tokens`` are the whole prompt, not an addition to the path.
        answer: its ``max_tokens`` tokens, where they are known.
        hints: of its client: fields ``radix_...`` of ``vllm_xargs``.
    """

    tokens: Sequence[int]
    max_tokens: int
    children: list["Turn"] = field(default_factory=list)
    arrival: float = 0.0
    delay: float = 0.0
    tenant: str = ""
    priority: int = 0
    salt: str | None = None
    whole: bool = False
    answer: Sequence[int] | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Workload:
    """A forest of turns.

    Attributes:
        name: key of ``BUILDERS``.
        pressure: the working set as a multiple of the cache, as measured.
        roots: turns sent at the start, in order.
    """

    name: str
    pressure: float
    roots: list[Turn]

    def turns(self) -> Iterator[Turn]:
        """Yield all turns, parents first."""
        stack = self.roots[::-1]
        while stack:
            turn = stack.pop()
            yield turn
            stack.extend(turn.children[::-1])


def longest_path(roots: Iterable[Turn]) -> int:
    """Return the tokens of the longest prompt with its answer: O(turns)."""
    longest = 0
    stack = [(root, 0) for root in roots]
    while stack:
        turn, before = stack.pop()
        before = 0 if turn.whole else before
        tokens = before + len(turn.tokens) + turn.max_tokens
        longest = max(longest, tokens)
        stack.extend((child, tokens) for child in turn.children)
    return longest
