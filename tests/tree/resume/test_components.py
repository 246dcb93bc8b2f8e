"""Which blocks each kind of layers needs: against the tokens that it reads."""

import pytest

from tree.resume.memory import first_read
from vllm_radix.tree.resume import Chunk, Dense, State, Window

SIZES = [1, 2, 3, 4, 16]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "make",
    [
        Dense,
        lambda size: Window(size, width=1),
        lambda size: Window(size, width=5),
        lambda size: Window(size, width=16),
        lambda size: Chunk(size, chunk=4),
        lambda size: Chunk(size, chunk=6),
        lambda size: Chunk(size, chunk=16),
    ],
)
def test_the_blocks_needed_are_those_of_the_tokens_read(make, size):
    component = make(size)
    for n in range(70):
        read = range(first_read(component, n), n)
        needed = range(component.first_block(n), component.end_block(n))
        assert {position // size for position in read} <= {*needed}
        if read:
            # And no block that holds none of them.
            assert needed[0] == read[0] // size
            assert needed[-1] == (n - 1) // size


@pytest.mark.parametrize("size", SIZES)
def test_a_state_needs_the_block_of_the_last_token_alone(size):
    component = State(size)
    assert not component.positional
    assert component.reach == 0
    for n in range(1, 70):
        assert component.first_block(n) == (n - 1) // size
        assert component.end_block(n) == component.first_block(n) + 1


@pytest.mark.parametrize(
    "component", [Window(4, width=6), Window(3, width=1), Chunk(4, chunk=6)]
)
def test_nothing_further_back_than_the_reach_is_needed(component):
    for n in range(70):
        first = component.first_block(n) * component.block_size
        assert n - first < component.reach


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Dense(0), "block_size must be at least 1, not 0"),
        (lambda: State(4, grain=0), "grain must be at least 1, not 0"),
        (lambda: Window(4, width=0), "width must be at least 1, not 0"),
        (lambda: Chunk(4, chunk=-1), "chunk must be at least 1, not -1"),
    ],
)
def test_a_size_of_nothing_is_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()
