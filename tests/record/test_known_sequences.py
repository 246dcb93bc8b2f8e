"""What a sequence shares with earlier ones: held against a comparison of all pairs."""

import random

import pytest

from vllm_radix.record.known_sequences import _BLOCK_SIZE, KnownSequences, Shared
from vllm_radix.tree import encode

NONE = Shared(-1, 0)


def common(a, b):
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def grown(rng, known):
    """Return a sequence that leaves an earlier one anywhere, or none."""
    stem = rng.choice(known)[1] if known and rng.random() < 0.9 else []
    cut = rng.randrange(len(stem) + 1)
    return stem[:cut] + [rng.randrange(3) for _ in range(rng.randrange(1, 600))]


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_shared_prefix_is_found_to_the_token(seed):
    rng, known = random.Random(seed), []
    sequences = KnownSequences(10_000_000)
    for number in range(150):
        namespace = rng.choice([None, "a"])
        tokens = grown(rng, known)
        found = sequences.add(encode(tokens), namespace, number)
        same = {n: common(t, tokens) for n, t, of in known if of == namespace}
        longest = max(same.values(), default=0)
        assert found.num_tokens == longest
        assert longest == 0 or same[found.number] == longest
        known.append((number, tokens, namespace))
    assert sequences._tree.check() is None


def test_what_is_least_recently_used_is_forgotten():
    sequences = KnownSequences(4 * _BLOCK_SIZE)
    first, second, third = ([n] * (2 * _BLOCK_SIZE) for n in (1, 2, 3))
    for number, tokens in enumerate((first, second, first, third)):
        sequences.add(encode(tokens), None, number)
    # Asked for without a tail, so that nothing more is forgotten by asking.
    assert sequences.add(encode(first), None, 9) == Shared(0, len(first))
    assert sequences.add(encode(third), None, 9) == Shared(3, len(third))
    assert sequences.add(encode(second), None, 9) == NONE
    sequences._tree.check()


def test_a_sequence_longer_than_all_that_is_kept_is_kept_in_part():
    sequences = KnownSequences(2 * _BLOCK_SIZE)
    tokens = list(range(5 * _BLOCK_SIZE + 7))
    sequences.add(encode(tokens), None, 0)
    assert sequences.add(encode(tokens), None, 1) == Shared(0, 2 * _BLOCK_SIZE)
    sequences._tree.check()


def test_after_forgetting_all_nothing_is_shared():
    sequences = KnownSequences(1000)
    sequences.add(encode(range(50)), None, 0)
    sequences.forget_all()
    assert sequences.add(encode(range(50)), None, 1) == NONE
    assert sequences.add(encode(range(50)), None, 2) == Shared(1, 50)
