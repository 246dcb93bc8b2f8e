"""The workloads of the A/B: seeded, and sized by the cache they meet.

A workload is a forest of turns. A turn's prompt is what was said before it on
its path, model's answers included, and its own tokens; it is sent when its
parent's answer is complete. All roots are sent at once, in order. So chat is a
forest of chains, tree search one of branching trees, and a batch of independent
requests one of single nodes.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from vllm_radix_bench import corpus

Encode = Callable[[str], list[int]]

REFERENCE_CACHE = 8192
"""Tokens of the cache for which the lengths below were chosen; they scale."""


@dataclass
class Turn:
    """One request: what it adds to the path so far, and how much to generate.

    Attributes:
        tokens: added to what was said before on the path.
        max_tokens: to generate, exactly.
        children: turns sent when this one is answered.
        arrival: seconds after the start before which it is not sent.
        tenant: who sends it; empty where that does not matter.
        priority: of vLLM's priority policy.
        salt: of the cache; None shares with all who have none.
        whole: whether ``tokens`` are the whole prompt, not an addition to the path.
    """

    tokens: Sequence[int]
    max_tokens: int
    children: list["Turn"] = field(default_factory=list)
    arrival: float = 0.0
    tenant: str = ""
    priority: int = 0
    salt: str | None = None
    whole: bool = False


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


def longest_path(workloads: Iterable[Workload]) -> int:
    """Return the tokens of the longest prompt with its answer."""
    longest = 0
    stack = [(turn, 0) for work in workloads for turn in work.roots]
    while stack:
        turn, before = stack.pop()
        before = 0 if turn.whole else before
        tokens = before + len(turn.tokens) + turn.max_tokens
        longest = max(longest, tokens)
        stack.extend((child, tokens) for child in turn.children)
    return longest


@dataclass
class Writer:
    """Makes token sequences of given lengths.

    Attributes:
        rng: the source of all choices.
        encode: text to token ids.
        scale: factor on lengths.
    """

    rng: random.Random
    encode: Encode
    scale: float

    def _fill(self, tokens: int, make: Callable[[random.Random], str]) -> list[int]:
        wanted = max(1, round(tokens * self.scale))
        text: list[int] = []
        while len(text) < wanted:
            text += self.encode(make(self.rng) + " ")
        return text[:wanted]

    def passage(self, tokens: int) -> list[int]:
        """Return running text."""
        return self._fill(tokens, corpus.sentence)

    def examples(self, tokens: int) -> list[int]:
        """Return worked examples, as a few-shot bank holds them."""
        return self._fill(tokens, corpus.worked_example)

    def question(self) -> list[int]:
        """Return a short question, not scaled."""
        return self.encode(corpus.question(self.rng))

    def open_example(self) -> list[int]:
        """Return a question for a few-shot bank, not scaled."""
        return self.encode(corpus.open_example(self.rng))


def _interleave(groups: list[list[Turn]]) -> list[Turn]:
    """Return the first of each group, then the second of each, and so on."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def few_shot(write: Writer, group: int) -> list[Turn]:
    """One bank of worked examples, 6 questions."""
    bank = write.examples(1200)
    return [Turn(bank + write.open_example(), 16) for _ in range(6)]


def chat(write: Writer, group: int) -> list[Turn]:
    """One user of one of 4 system prompts, 3 turns."""
    system = Writer(random.Random(group % 4), write.encode, write.scale).passage(400)
    turns = [Turn(write.passage(150), 24) for _ in range(3)]
    turns[0].tokens = [*system, *turns[0].tokens]
    for turn, following in pairwise(turns):
        turn.children = [following]
    return [turns[0]]


def agents(write: Writer, group: int) -> list[Turn]:
    """One task, 4 rollouts that branch late, each branching in 2 again."""
    tools = Writer(random.Random(0), write.encode, write.scale).passage(150)
    root = Turn(tools + write.passage(650), 24)
    root.children = [Turn(write.passage(50), 24) for _ in range(4)]
    for rollout in root.children:
        rollout.children = [Turn(write.passage(50), 24) for _ in range(2)]
    return [root]


def documents(write: Writer, group: int) -> list[Turn]:
    """One document, 2 sessions of 3 questions each."""
    document = write.passage(1400)
    sessions = []
    for _ in range(2):
        turns = [Turn(write.question(), 24) for _ in range(3)]
        turns[0].tokens = [*document, *turns[0].tokens]
        for turn, following in pairwise(turns):
            turn.children = [following]
        sessions.append(turns[0])
    return sessions


def control(write: Writer, group: int) -> list[Turn]:
    """One request that shares nothing, not even how its text begins."""
    own = write.encode(f"{write.rng.random()} ")
    return [Turn([*own, *write.passage(600)][: max(1, round(600 * write.scale))], 16)]


def lookups(write: Writer, group: int) -> list[Turn]:
    """One document, 6 single questions about it."""
    document = write.passage(1400)
    return [Turn([*document, *write.question()], 24) for _ in range(6)]


def search(write: Writer, group: int) -> list[Turn]:
    """One tree search: 3 branches of 3 late-branching leaves."""
    root = write.passage(700)
    leaves = []
    for _ in range(3):
        branch = root + write.passage(300)
        leaves += [Turn(branch + write.passage(80), 24) for _ in range(3)]
    return leaves


def flood(write: Writer, group: int) -> list[Turn]:
    """20 requests of one hot prefix, and one of another tenant that shares nothing."""
    hot = Writer(random.Random(0), write.encode, write.scale).passage(1200)
    many = [Turn([*hot, *write.passage(300)], 24, tenant="hot") for _ in range(20)]
    at = write.rng.randrange(len(many))
    return [*many[:at], Turn(write.passage(1500), 24, tenant="cold"), *many[at:]]


BUILDERS: dict[str, Callable[[Writer, int], list[Turn]]] = {
    "few-shot": few_shot,
    "chat": chat,
    "agents": agents,
    "documents": documents,
    "control": control,
    "lookups": lookups,
    "search": search,
    "flood": flood,
}

SERVED = ("few-shot", "chat", "agents", "documents", "control")
"""Those that the A/B serves on real engines."""


class BlockCounter:
    """Counts the distinct blocks of all prompts and answers added to it.

    An answer is counted as shared with nothing but its own continuations.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        # (block before, tokens) of each distinct block, to its number.
        self._blocks: dict[tuple[int, tuple[int, ...]], int] = {}
        self._answers = 0

    def add(self, roots: list[Turn]) -> int:
        """Add trees of turns; return the distinct blocks so far. O(tokens)."""
        stack: list[tuple[Turn, int, list[int]]] = [(turn, 0, []) for turn in roots]
        while stack:
            turn, block, rest = stack.pop()
            first = self._answers + 1
            self._answers += turn.max_tokens
            answer = [-i for i in range(first, first + turn.max_tokens)]
            if turn.whole:
                block, rest = 0, []
            rest = [*rest, *turn.tokens, *answer]
            whole = len(rest) // self._size * self._size
            for at in range(0, whole, self._size):
                key = block, tuple(rest[at : at + self._size])
                block = self._blocks.setdefault(key, len(self._blocks) + 1)
            stack.extend((child, block, rest[whole:]) for child in turn.children)
        return len(self._blocks)


def build(
    name: str,
    encode: Encode,
    *,
    num_blocks: int,
    block_size: int,
    pressure: float,
    seed: int,
    max_tokens: int | None = None,
    stretch: float = 1.0,
) -> Workload:
    """Build a workload whose working set is ``pressure`` times the cache.

    Groups (banks, users, tasks, documents) are added until the next one would
    go further past the target than it falls short without it.

    Args:
        name: a key of ``BUILDERS``.
        encode: text to token ids, without special tokens.
        num_blocks: blocks of the cache.
        block_size: tokens in a block.
        pressure: working set over cache; the result tells what was reached.
        seed: of all choices.
        max_tokens: generate at most this many per turn.
        stretch: factor on lengths; longer prompts make fewer requests.
    """
    target = pressure * num_blocks
    scale = stretch * num_blocks * block_size / REFERENCE_CACHE
    write = Writer(random.Random(f"{name} {seed}"), encode, scale)
    counter = BlockCounter(block_size)
    groups: list[list[Turn]] = []
    reached = 0
    while reached < target:
        group = BUILDERS[name](write, len(groups))
        for turn in Workload(name, 0, group).turns():
            turn.max_tokens = min(turn.max_tokens, max_tokens or turn.max_tokens)
        before, reached = reached, counter.add(group)
        if groups and reached - target > target - before:
            reached = before
            break
        groups.append(group)
    return Workload(name, reached / num_blocks, _interleave(groups))
