"""The built-in workloads: seeded groups of turns that share what their names say."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from vllm_radix_bench.workloads import corpus
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn


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
