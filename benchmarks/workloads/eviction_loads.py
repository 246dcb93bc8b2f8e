"""Requests one after the other, to compare orders of eviction.

A request is the ids of its blocks: equal ids stand for equal tokens. Loads are drawn
from a seed: sessions, retrieval whose popular documents change, agents, and four that
are made to fool a rule that learns.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from vllm_radix_bench.traces.hashed_prompt import HashedPrompt
from vllm_radix_bench.workloads.turn import Turn

BLOCK_SIZE = 16


class Blocks(NamedTuple):
    """A request.

    Attributes:
        prompt: ids of the full blocks of its prompt.
        answer: ids of the blocks that are full when it ends, besides.
        prompt_tokens: of its prompt.
        output_tokens: of its answer.
    """

    prompt: list[int]
    answer: list[int]
    prompt_tokens: int
    output_tokens: int


def _request(path: list[int], answer: list[int]) -> Blocks:
    return Blocks(path, answer, len(path) * BLOCK_SIZE, len(answer) * BLOCK_SIZE)


def _some(fresh: Iterator[int], number: int) -> list[int]:
    return [next(fresh) for _ in range(number)]


def chats(rng: random.Random) -> Iterator[Blocks]:
    """Yield turns of conversations under shared system prompts; most are short."""
    fresh = count()
    systems = [_some(fresh, rng.randrange(10, 60)) for _ in range(20)]
    weights = [1 / (1 + place) for place in range(20)]
    talks: list[tuple[list[int], float]] = []
    while True:
        if len(talks) < 150:
            (system,) = rng.choices(systems, weights)
            talks.append((list(system), rng.choice((0.5, 0.8, 0.95))))
        # Whoever spoke lately speaks next: the end of the list.
        at = len(talks) - 1 - min(len(talks) - 1, int(rng.expovariate(1 / 40)))
        path, goes_on = talks.pop(at)
        path = [*path, *_some(fresh, rng.randrange(2, 25))]
        answer = _some(fresh, rng.randrange(1, 30))
        yield _request(path, answer)
        if rng.random() < goes_on:
            talks.append((path + answer, goes_on))


def retrieval(rng: random.Random) -> Iterator[Blocks]:
    """Yield questions on two documents of many; which are popular changes slowly."""
    fresh = count()
    system = _some(fresh, 8)
    documents = [_some(fresh, rng.randrange(8, 40)) for _ in range(600)]
    weights = [1 / (1 + place) ** 0.9 for place in range(600)]
    for number in count():
        if number % 400 == 399:
            for _ in range(120):
                one, other = rng.randrange(600), rng.randrange(600)
                documents[one], documents[other] = documents[other], documents[one]
        first, second = rng.choices(documents, weights, k=2)
        # A document behind another is another: its tokens are seen through the first.
        behind = [1000 * block + first[0] + 10**7 for block in second]
        yield _request([*system, *first, *behind, *_some(fresh, 2)], _some(fresh, 4))


def agents(rng: random.Random) -> Iterator[Blocks]:
    """Yield steps of agents: contexts that grow by tool results, many at a time."""
    fresh = count()
    tools = [_some(fresh, rng.randrange(60, 140)) for _ in range(4)]
    tasks: list[tuple[list[int], int]] = []
    while True:
        while len(tasks) < 40:
            tasks.append((list(rng.choice(tools)), rng.choice((2, 5, 40))))
        at = rng.randrange(len(tasks))
        path, left = tasks.pop(at)
        path = [*path, *_some(fresh, rng.randrange(4, 40))]
        answer = _some(fresh, rng.randrange(1, 6))
        yield _request(path, answer)
        if left:
            tasks.append((path + answer, left - 1))


def scan(rng: random.Random) -> Iterator[Blocks]:
    """Yield popular prompts among long ones that come once."""
    fresh = count()
    popular = [_some(fresh, 30) for _ in range(60)]
    while True:
        if rng.random() < 0.5:
            yield _request([*rng.choice(popular), *_some(fresh, 2)], _some(fresh, 2))
        else:
            yield _request(_some(fresh, 60), _some(fresh, 2))


def loop(rng: random.Random) -> Iterator[Blocks]:
    """Yield the same prompts over and over, in the same order."""
    fresh = count()
    prompts = [_some(fresh, rng.randrange(20, 40)) for _ in range(300)]
    while True:
        for prompt in prompts:
            yield _request(prompt, [])


def flip(rng: random.Random) -> Iterator[Blocks]:
    """Yield phases of a loop and of sessions that grow, in turns."""
    looping, growing = loop(rng), chats(rng)
    while True:
        for _ in range(700):
            yield next(looping)
        for _ in range(700):
            path, answer, tokens, generated = next(growing)
            shifted = [block + 10**8 for block in path]
            yield Blocks(shifted, [b + 10**8 for b in answer], tokens, generated)


def fool(rng: random.Random) -> Iterator[Blocks]:
    """Yield what teaches that used prompts come back, until they do not, and so on.

    In one phase all prompts come twice, soon; in the next those that came twice never
    do again, and those that came once come late.
    """
    fresh = count()
    for phase in count():
        recent: list[list[int]] = []
        for _ in range(600):
            if recent and rng.random() < 0.5:
                at = -1 if phase % 2 == 0 else 0
                if phase % 2 == 0 or len(recent) > 80:
                    yield _request(recent.pop(at), [])
                    continue
            prompt = _some(fresh, 25)
            recent.append(prompt)
            yield _request(prompt, [])


LOADS: dict[str, Callable[[random.Random], Iterator[Blocks]]] = {
    "chats": chats,
    "retrieval": retrieval,
    "agents": agents,
    "scan": scan,
    "loop": loop,
    "flip": flip,
    "fool": fool,
}
"""Loads that never end, by name."""


def draw(name: str, seed: int, requests: int) -> list[Blocks]:
    """Return the first requests of a load."""
    made = LOADS[name](random.Random(f"{name} {seed}"))
    return [next(made) for _ in range(requests)]


def from_trace(roots: Sequence[Turn]) -> tuple[list[Blocks], int]:
    """Return the requests of a trace of hashed prompts, and the tokens of a block.

    An answer has the blocks with which a later prompt goes on from its own, if that is
    the first to do so; else nobody has asked for its blocks.

    Raises:
        ValueError: prompts are not made up from hashes.
    """
    prompts = []
    for root in roots:
        if not isinstance(root.tokens, HashedPrompt):
            raise ValueError("the trace has prompts of another form than hash ids")
        prompts.append(root.tokens)
    size = prompts[0].hashed_tokens
    paths = [list(prompt.firsts)[: len(prompt) // size] for prompt in prompts]
    first: dict[int, int] = {}
    for number, path in enumerate(paths):
        for block in path:
            first.setdefault(block, number)
    # By block the next request that has it, and where.
    later: dict[int, tuple[int, int]] = {}
    answers: list[list[int]] = [[] for _ in paths]
    for number in range(len(paths) - 1, -1, -1):
        path = paths[number]
        if path and first[path[-1]] == number and path[-1] in later:
            other, at = later[path[-1]]
            following = paths[other][at + 1 :]
            answers[number] = [b for b in following if first[b] == other]
        for at, block in enumerate(path):
            later[block] = number, at
    fresh = count(1 << 30)
    out = []
    for root, path, known in zip(roots, paths, answers, strict=True):
        tokens = len(root.tokens)
        filled = (tokens + root.max_tokens) // size - len(path)
        answer = known[:filled] + _some(fresh, filled - len(known[:filled]))
        out.append(Blocks(path, answer, tokens, root.max_tokens))
    return out, size
