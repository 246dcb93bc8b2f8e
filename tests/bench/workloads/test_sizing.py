"""The workloads: seeded, sized as asked, and what their names say."""

from zlib import crc32

import pytest

from vllm_radix_bench.workloads.builders import BUILDERS
from vllm_radix_bench.workloads.sizing import BlockCounter, build
from vllm_radix_bench.workloads.turn import Turn, longest_path


def encode(text):
    """A token a word is enough to test shapes."""
    return [3 + crc32(word.encode()) % 40_000 for word in text.split()]


def make(name, pressure=4.0, seed=0, **fields):
    return build(
        name, encode, num_blocks=128, block_size=32, pressure=pressure, seed=seed,
        **fields,
    )  # fmt: skip


def flat(work):
    return [(turn.tokens, turn.max_tokens) for turn in work.turns()]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("pressure", [2.0, 4.0])
def test_the_working_set_is_what_was_asked_for(name, pressure):
    work = make(name, pressure)
    # Whole groups are added: as near as the size of one allows.
    assert work.pressure == pytest.approx(pressure, rel=0.2)
    counter = BlockCounter(32)
    assert counter.add(work.roots) / 128 == work.pressure


@pytest.mark.parametrize("name", BUILDERS)
def test_seeds_decide_everything(name):
    assert flat(make(name)) == flat(make(name))
    assert flat(make(name)) != flat(make(name, seed=1))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_shared_prefix_is_there_or_not(name):
    firsts = [tuple(root.tokens[:32]) for root in make(name).roots]
    shares = len(set(firsts)) < len(firsts)
    assert shares == (name != "control")


def test_few_shot_is_interleaved():
    firsts = [tuple(root.tokens[:32]) for root in make("few-shot").roots]
    banks = len(set(firsts))
    assert len(set(firsts[:banks])) == banks


def test_closed_loops_have_turns():
    assert all(turn.children for turn in make("chat").roots)
    assert all(len(root.children) == 4 for root in make("agents").roots)
    assert all(turn.children for turn in make("documents").roots)


def test_answers_can_be_cut_short():
    assert {turn.max_tokens for turn in make("chat", max_tokens=6).turns()} == {6}


def test_distinct_blocks_are_counted_once_and_answers_apart():
    counter = BlockCounter(4)
    tail = Turn([9, 9], 2)
    # Blocks: 1234, then the answer's 2 tokens with 99, then the tail's answer.
    assert counter.add([Turn([1, 2, 3, 4], 2, [tail])]) == 2
    assert counter.add([Turn([1, 2, 3, 4], 2), Turn([1, 2, 3, 4], 4)]) == 3


def test_the_longest_path_is_the_longest_prompt_with_its_answer():
    chain = Turn([1] * 5, 2, [Turn([1] * 3, 4), Turn([1], 1)])
    assert longest_path([chain, Turn([1] * 9, 1)]) == 14
