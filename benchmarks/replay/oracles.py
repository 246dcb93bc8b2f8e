"""What a cache could do at best: bounds to hold an arm against."""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count

import numpy as np

from vllm_radix.tree import BYTES_PER_TOKEN, common_units
from vllm_radix_bench.replay.cache_keys import CacheKeys, Home
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


def infinite_cache(roots: Sequence[Turn], by: CacheKeys | None = None) -> int:
    """Return a lower bound of the prompt tokens to compute: nothing is ever evicted.

    The size of the tree of all prompts and answers, less the answers; O(n log n)
    comparisons of prompts. Blocks have no boundaries here, and the last token of a
    known prompt, which an engine computes for its logits, is not counted.

    Args:
        roots: the requests.
        by: what the cache tells prompts apart by; None: salts share nothing.
    """
    by = by or CacheKeys()
    # With each sequence the length of its prompt: what follows is a known answer.
    keys: dict[tuple[bool, str], list[tuple[bytes, int]]] = {}
    homes: dict[str, tuple[Home, int]] = {}
    answered = 0
    for name, turn, prompt in every_turn(roots):
        home = by.home(turn.salt, prompt)
        homes[name] = home, turn.max_tokens
        known = turn.answer or ()
        # An engine never computes the KV of an answer's last token.
        key = home.key([*prompt, *known[: len(known) - 1]])
        keys.setdefault(home.namespace, []).append((key, len(prompt)))
        # One that is made up is in the prompts that go on from it, and only there:
        # counted once for all that are cached where the turn before is.
        parent, _, _ = name.rpartition(".")
        if parent in homes and not turn.whole and homes[parent][0] == home:
            answered += homes[parent][1]
            homes[parent] = home, 0
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


def known_in_advance(
    roots: Sequence[Turn], by: CacheKeys | None = None
) -> tuple[list[Turn], dict[str, list[int]]]:
    """Return all requests at once, in depth-first order, and their answers.

    That order is the best there is when all requests are known (Zheng et al., 2024,
    theorem 3.1); with answers known, a conversation's turns are too.

    Args:
        roots: the requests.
        by: what the cache tells prompts apart by; None: salts share nothing.
    """
    by = by or CacheKeys()
    turns = []
    for _, turn, prompt in every_turn(roots):
        flat = Turn(prompt, turn.max_tokens, tenant=turn.tenant, salt=turn.salt)
        flat.answer = turn.answer
        home = by.home(turn.salt, prompt)
        turns.append((home.namespace, home.key(prompt), flat))
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


def farthest_next_use(
    paths: Sequence[Sequence[int]], asked: Sequence[int], blocks: int
) -> int:
    """Return the blocks that are found if those needed last are evicted first.

    Requests are served one after the other, and each holds its path meanwhile. Of
    blocks of one size no order of eviction finds more (Belady, 1966): a block is needed
    no later than those below it, so that with ties broken by depth they go before it.
    O(n log n) for n blocks of all paths.

    Args:
        paths: ids of the blocks of each request, answer included; none is longer than
            the cache.
        asked: for each how many of them are of the prompt.
        blocks: of the cache.
    """
    never = len(paths)
    # By request: when the path's blocks are needed again.
    following: list[list[int]] = []
    coming: dict[int, int] = {}
    for number in range(len(paths) - 1, -1, -1):
        path = paths[number]
        following.append([coming.get(block, never) for block in path])
        coming.update(dict.fromkeys(path, number))
    following.reverse()
    cached: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    found = 0
    for path, prompt, needed in zip(paths, asked, following, strict=True):
        hit = 0
        while hit < prompt and path[hit] in cached:
            hit += 1
        found += hit
        for block in path:
            cached.pop(block, None)
        while len(cached) + len(path) > blocks:
            when, _, block = heappop(heap)
            if cached.get(block) == -when:
                del cached[block]
        for depth, (block, when) in enumerate(zip(path, needed, strict=True)):
            cached[block] = when
            heappush(heap, (-when, -depth, block))
    return found


def best_eviction(
    roots: Sequence[Turn],
    order: Sequence[str],
    blocks: int,
    block_size: int,
    by: CacheKeys | None = None,
) -> int:
    """Return the prompt tokens found in whole blocks with ``farthest_next_use``.

    Args:
        roots: the requests.
        order: their ids, in the order in which they are served.
        blocks: of the cache; no request is longer.
        block_size: tokens of a block.
        by: what the cache tells prompts apart by; None: salts share nothing.
    """
    by = by or CacheKeys()
    homes: dict[str, Home] = {}
    ids: dict[tuple[object, bytes], int] = {}
    size = block_size * BYTES_PER_TOKEN
    paths: dict[str, list[int]] = {}
    asked: dict[str, int] = {}
    for name, turn, prompt in every_turn(roots):
        home = homes[name] = by.home(turn.salt, prompt)
        key, path = home.key(prompt), list[int]()
        for at in range(0, len(key) - size + 1, size):
            before = path[-1] if path else ("root", home.namespace)
            path.append(ids.setdefault((before, key[at : at + size]), len(ids)))
        parent, _, number = name.rpartition(".")
        same = parent and number == "0" and homes[parent] == home
        if same and not turn.whole:
            # What this turn goes on from: the blocks of the answer are cached as well.
            end = len(prompt) - len(turn.tokens)
            paths[parent] = path[: end // block_size]
        # The last token is computed in any case, for its logits.
        paths[name], asked[name] = path, (len(prompt) - 1) // block_size
    served = [paths[name] for name in order]
    return block_size * farthest_next_use(served, [asked[n] for n in order], blocks)
