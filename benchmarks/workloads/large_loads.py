"""Loads of the size that users run: the second half of `make policies`.

128 requests at a time, blocks of 16 tokens, a budget of 8,192 tokens a step, a cache
that holds a part of the working set. Texts are random words: only which are equal
matters.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from vllm_radix_bench.workloads.turn import Turn

BLOCK_SIZE = 16

Roots = list[Turn]


def _text(rng: random.Random, low: int, high: int | None = None) -> list[int]:
    length = low if high is None else rng.randint(low, high)
    return rng.choices(range(1 << 28), k=length)


def _chain(turns: Roots) -> Turn:
    for turn, following in pairwise(turns):
        turn.children = [following]
    return turns[0]


def few_shot(rng: random.Random) -> Roots:
    """16 banks of 3,000 tokens, 40 questions each."""
    banks = [_text(rng, 3000) for _ in range(16)]
    return [Turn(bank + _text(rng, 40, 80), 32) for bank in banks for _ in range(40)]


def documents(rng: random.Random) -> Roots:
    """60 documents of 4,000 to 8,000 tokens, 2 sessions of 3 questions each."""
    roots = []
    for _ in range(60):
        document = _text(rng, 4000, 8000)
        for _ in range(2):
            turns = [Turn(_text(rng, 40, 100), 100) for _ in range(3)]
            turns[0].tokens = document + list(turns[0].tokens)
            roots.append(_chain(turns))
    return roots


def chat(rng: random.Random) -> Roots:
    """250 users of one of 4 system prompts of 1,500 tokens, 4 turns each."""
    systems = [_text(rng, 1500) for _ in range(4)]
    roots = []
    for user in range(250):
        turns = [Turn(_text(rng, 100, 700), 150) for _ in range(4)]
        turns[0].tokens = systems[user % 4] + list(turns[0].tokens)
        roots.append(_chain(turns))
    return roots


def tree_search(rng: random.Random) -> Roots:
    """24 problems of 3,000 tokens: 4 branches, 4 steps below each, 2 below those."""

    def grow(depth: int) -> Roots:
        if not depth:
            return []
        width = {3: 4, 2: 4, 1: 2}[depth]
        return [Turn(_text(rng, 60, 140), 100, grow(depth - 1)) for _ in range(width)]

    return [Turn(_text(rng, 3000), 100, grow(3)) for _ in range(24)]


def flood(rng: random.Random, cold: int = 40) -> Roots:
    """600 requests of one hot prefix of 2,000 tokens, and some of another tenant."""
    hot = _text(rng, 2000)
    roots = [Turn(hot + _text(rng, 200, 600), 60, tenant="hot") for _ in range(600)]
    roots += [Turn(_text(rng, 1500, 2500), 60, tenant="cold") for _ in range(cold)]
    return roots


def flood_of_many(rng: random.Random) -> Roots:
    """A flood with 200 requests of the other tenant."""
    return flood(rng, 200)


def control(rng: random.Random) -> Roots:
    """500 requests that share nothing."""
    return [Turn(_text(rng, 500, 2500), 100) for _ in range(500)]


@dataclass(frozen=True)
class Load:
    """A workload, its size against the cache, and how its requests arrive.

    Attributes:
        name: of the load.
        build: makes the roots.
        rate: arrivals over what stock serves; 0 sends all at once.
        cache: blocks of the cache over those of the working set; or blocks, from 2 on.
        slots: requests at a time.
        burst: requests that arrive together.
        sessions: roots under way at a time, each following one that has ended; 0 for
            no such limit.
    """

    name: str
    build: Callable[[random.Random], Roots]
    rate: float = 0.0
    cache: float = 0.2
    slots: int = 128
    burst: int = 1
    sessions: int = 0


LOADS = (
    Load("few-shot at once", few_shot),
    Load("few-shot at once, half", few_shot, cache=0.5),
    Load("few-shot 2.5x", few_shot, rate=2.5),
    Load("documents 2x", documents, rate=2.0),
    Load("documents 1.3x", documents, rate=1.3),
    Load("tree search", tree_search),
    Load("tree search, half", tree_search, cache=0.5),
    Load("chat 3x", chat, rate=3.0),
    Load("chat 3x, bursty", chat, rate=3.0, burst=40),
    Load("chat 2x, 8 slots", chat, rate=2.0, slots=8),
    Load("documents 2x, 8 slots", documents, rate=2.0, slots=8),
    Load("flood, 40 cold", flood, rate=1.5),
    Load("flood, 200 cold", flood_of_many, rate=1.5),
    Load("control 1.5x", control, rate=1.5),
    Load("documents, 24 sessions, 8 slots", documents, slots=8, sessions=24),
)


def follow_each_other(roots: Roots, sessions: int) -> Iterator[Turn]:
    """Yield the first roots; each of the others follows the last turn of one."""
    last: list[Turn] = []
    for at, root in enumerate(roots):
        end = root
        while end.children:
            end = end.children[0]
        if at < sessions:
            yield root
            last.append(end)
        else:
            root.whole = True
            last[at % sessions].children = [root]
            last[at % sessions] = end
