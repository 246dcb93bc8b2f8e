"""Loads for hybrid models: shared prefixes with room for all, and sessions without.

Prompts are whole, answers are known: a run is the same whatever the cache does.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm_radix.tree import BYTES_PER_TOKEN, common_units, encode
from vllm_radix_bench.workloads.turn import Turn

ANSWER = 7
"""Every token of every answer."""
_GAP = 1e4
"""Seconds from a wave of requests to the next: more than a wave takes."""

Waves = list[list[Turn]]
"""Requests in the order in which they are sent; a wave waits for the one before."""


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 49_000) for _ in range(count)]


def documents(seed: int) -> Waves:
    """Return 40 requests at once: instructions, one of 8 documents, a question."""
    rng = random.Random(1 + seed)
    instructions = _tokens(rng, 600)
    texts = [_tokens(rng, 1500) for _ in range(8)]
    return [
        [
            Turn(instructions + texts[rng.randrange(8)] + _tokens(rng, 100), 30)
            for _ in range(40)
        ]
    ]


def chat(seed: int) -> Waves:
    """Return 6 turns of 8 sessions with the same instructions, a wave for each turn."""
    rng = random.Random(2 + seed)
    instructions = _tokens(rng, 600)
    paths = [instructions + _tokens(rng, 200) for _ in range(8)]
    waves: Waves = []
    for _ in range(6):
        wave = []
        for number, path in enumerate(paths):
            wave.append(Turn(path, 150))
            paths[number] = path + [ANSWER] * 150 + _tokens(rng, 80)
        waves.append(wave)
    return waves


def fork_tree(seed: int) -> Waves:
    """Return the 27 leaves of a tree that forks in three at three depths, shuffled."""
    rng = random.Random(3 + seed)
    leaves: list[Turn] = []

    def grow(path: list[int], depth: int) -> None:
        if depth == 3:
            leaves.append(Turn(path + _tokens(rng, 60), 20))
            return
        for _ in range(3):
            grow(path + _tokens(rng, 400), depth + 1)

    grow(_tokens(rng, 500), 0)
    rng.shuffle(leaves)
    return [leaves]


TRAFFIC: dict[str, Callable[[int], Waves]] = {
    "documents": documents,
    "chat": chat,
    "fork tree": fork_tree,
}


def one_by_one(waves: Waves) -> Waves:
    """Return the same requests, each in a wave of its own."""
    return [[turn] for wave in waves for turn in wave]


def roots_of(waves: Waves) -> tuple[list[Turn], dict[str, list[int]]]:
    """Return requests to run, sent wave by wave, and their answers by id."""
    roots = []
    for number, wave in enumerate(waves):
        for turn in wave:
            turn.arrival = number * _GAP
            roots.append(turn)
    answers = {str(i): [ANSWER] * turn.max_tokens for i, turn in enumerate(roots)}
    return roots, answers


def generated_after_first(roots: Iterable[Turn]) -> int:
    """Return the steps that feed a generated token back."""
    return sum(turn.max_tokens - 1 for turn in roots)


def fewest_tokens(roots: Sequence[Turn]) -> int:
    """Return what must be computed, in this order, if every hit ends where it can.

    Nothing is ever evicted, and the last token of a prompt is computed always.
    """
    seen: list[bytes] = []
    total = generated_after_first(roots)
    for turn in roots:
        key = encode(turn.tokens)
        hit = max(
            (common_units(key, 0, other, 0, BYTES_PER_TOKEN) for other in seen),
            default=0,
        )
        total += len(turn.tokens) - min(hit, len(turn.tokens) - 1)
        seen.append(key + encode([ANSWER] * turn.max_tokens))
    return total


@dataclass(frozen=True)
class Sessions:
    """Conversations over a small cache; each request has all that was said before.

    Attributes:
        sessions: number of them.
        rounds: requests of a session, on average.
        start: tokens of a session's first prompt.
        answer: tokens of each answer.
        order: who is next: ``in turn``, ``random``, or ``zipf``, where the n-th
            session speaks 1/n as often as the first.
        added: tokens that follow an answer.
    """

    sessions: int = 6
    rounds: int = 5
    start: int = 1500
    answer: int = 50
    order: str = "in turn"
    added: int = 100

    def waves(self, seed: int) -> Waves:
        """Return the requests, one by one."""
        rng = random.Random(3 + seed)
        paths = [_tokens(rng, self.start) for _ in range(self.sessions)]
        waves: Waves = []
        for speaker in self._speakers(seed):
            path = paths[speaker]
            waves.append([Turn(path, self.answer)])
            rest = _tokens(rng, self.added)
            paths[speaker] = path + [ANSWER] * self.answer + rest
        return waves

    def _speakers(self, seed: int) -> list[int]:
        everyone = list(range(self.sessions))
        if self.order == "in turn":
            return everyone * self.rounds
        weights = [1 / (n + 1) if self.order == "zipf" else 1.0 for n in everyone]
        rng = random.Random(f"speakers {seed}")
        return rng.choices(everyone, weights, k=self.sessions * self.rounds)


ORDERS = ("in turn", "random", "zipf")


def draw_sessions(rng: random.Random, order: str) -> Sessions:
    """Return sessions of sizes that nobody chose."""
    return Sessions(
        sessions=rng.randint(3, 12),
        rounds=rng.randint(3, 6),
        start=rng.choice((400, 800, 1500, 3000)),
        answer=rng.choice((10, 50, 150)),
        order=order,
    )
