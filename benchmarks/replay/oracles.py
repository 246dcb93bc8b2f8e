"""What a cache could do at best: bounds to hold an arm against."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from vllm_radix.tree import BYTES_PER_TOKEN, common_units, encode
from vllm_radix_bench.workloads.turn import Turn

_MADE_UP = 3 << 29
"""Answers that oracles make up count up from here."""


def every_turn(roots: Sequence[Turn]) -> Iterator[tuple[str, Turn, list[int]]]:
    """Yield id, turn and whole prompt of every request, answers made up.

    The prompts are those of ``VirtualRun``, but for the tokens of the answers.
    """
    answers = count(_MADE_UP)
    stack = [(str(i), root, list[int]()) for i, root in enumerate(roots)][::-1]
    while stack:
        name, turn, before = stack.pop()
        prompt = list(turn.tokens) if turn.whole else [*before, *turn.tokens]
        yield name, turn, prompt
        if turn.children:
            answer = [next(answers) for _ in range(turn.max_tokens)]
            path = prompt + answer
            stack += [
                (f"{name}.{i}", child, path) for i, child in enumerate(turn.children)
            ][::-1]


def infinite_cache(roots: Sequence[Turn]) -> int:
    """Return a lower bound of the prompt tokens to compute: nothing is ever evicted.

    The size of the tree of all prompts and answers, less the answers; O(n log n)
    comparisons of prompts. Blocks have no boundaries here, and the last token of a
    known prompt, which an engine computes for its logits, is not counted.
    """
    # With each sequence the length of its prompt: what follows is a known answer.
    keys: dict[str | None, list[tuple[bytes, int]]] = {}
    answered = 0
    for _, turn, prompt in every_turn(roots):
        known = turn.answer or ()
        # An engine never computes the KV of an answer's last token.
        key = encode([*prompt, *known[: len(known) - 1]])
        keys.setdefault(turn.salt, []).append((key, len(prompt)))
        # One that is made up is in the prompts that go on from it, and only there.
        if not all(child.whole for child in turn.children):
            answered += turn.max_tokens
    tokens = 0
    for same in keys.values():
        before = b""
        # Of the tokens on the path: whether they were generated.
        generated = np.zeros(max(len(key) for key, _ in same), dtype=bool)
        for key, start in sorted(same):
            shared = common_units(before, 0, key, 0, BYTES_PER_TOKEN)
            end = len(key) // BYTES_PER_TOKEN
            generated[shared:end] = False
            answered += int(np.count_nonzero(~generated[start:end]))
            generated[start:end] = True
            tokens += end - shared
            before = key
    return tokens - answered


def known_in_advance(roots: Sequence[Turn]) -> tuple[list[Turn], dict[str, list[int]]]:
    """Return all requests at once, in depth-first order, and their answers.

    That order is the best there is when all requests are known (Zheng et al., 2024,
    theorem 3.1); with answers known, a conversation's turns are too.
    """
    turns = []
    for _, turn, prompt in every_turn(roots):
        flat = Turn(prompt, turn.max_tokens, tenant=turn.tenant, salt=turn.salt)
        flat.answer = turn.answer
        turns.append((turn.salt or "", encode(prompt), flat))
    turns.sort(key=lambda entry: entry[:2])
    answers: dict[str, list[int]] = {}
    for at, (_, key, flat) in enumerate(turns):
        following = turns[at + 1][1] if at + 1 < len(turns) else b""
        if following.startswith(key):
            start = len(flat.tokens)
            answers[str(at)] = list(turns[at + 1][2].tokens)[start:][: flat.max_tokens]
    fresh = count(7 << 28)
    for name, known in answers.items():
        short = turns[int(name)][2].max_tokens - len(known)
        known += [next(fresh) for _ in range(short)]
    return [flat for *_, flat in turns], answers
