"""Reading what a server has recorded: who shares how much, and bad lines."""

import json

import pytest

from vllm_radix.record import EndedRequest, TraceWriter
from vllm_radix.tree import common_units, encode
from vllm_radix_bench.replay.oracles import infinite_cache, known_in_advance
from vllm_radix_bench.traces.line import TraceError
from vllm_radix_bench.traces.load import load

HEADER = {"vllm_radix_trace": 1, "server": {"blocks": 7}}


def request(number, **fields):
    made = {"request": number, "arrival": number, "input_length": 10}
    return {**made, "output_length": 4, "cached": 0, **fields}


@pytest.fixture
def read(tmp_path):
    """Return a function that writes lines and loads them."""

    def loaded(*lines, **options):
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return load(path, None, **options)

    return loaded


def shared(a, b):
    """Return how many tokens two turns share, answers included."""
    keys = [encode([*turn.tokens, *(turn.answer or ())]) for turn in (a, b)]
    return common_units(keys[0], 0, keys[1], 0, 4)


def test_requests_share_what_they_did(read):
    turns = read(
        HEADER,
        request(0),
        request(1, of=0, shared=14, input_length=20),  # goes on from the answer
        request(2, of=1, shared=12),
        request(3, of=1, shared=17, input_length=30),
        request(4, of=0, shared=12, input_length=12, output_length=2),
        request(5, of=3, shared=10, output_length=0),
        request(6),
    )
    table = [[shared(a, b) for b in turns] for a in turns]
    assert table == [
        [14, 14, 12, 14, 12, 10, 0],
        [14, 24, 12, 17, 12, 10, 0],
        [12, 12, 14, 12, 12, 10, 0],
        [14, 17, 12, 34, 12, 10, 0],
        [12, 12, 12, 12, 14, 10, 0],
        [10, 10, 10, 10, 10, 10, 0],
        [0, 0, 0, 0, 0, 0, 14],
    ]
    assert [len(turn.tokens) for turn in turns] == [10, 20, 10, 30, 12, 10, 10]
    assert [len(turn.answer or ()) for turn in turns] == [4, 4, 4, 4, 2, 0, 4]
    assert [turn.max_tokens for turn in turns] == [4, 4, 4, 4, 2, 1, 4]


def test_ids_are_read_where_they_are(read):
    first, second, media = read(
        HEADER,
        request(0, new_ids=[*range(20, 34)]),
        request(1, of=0, shared=12, new_ids=[5, 6]),
        request(2, of=0, shared=3),
    )
    assert list(first.tokens) == [*range(20, 30)]
    assert first.answer == [30, 31, 32, 33]
    assert first.tokens[-1] == 29 and first.tokens[2:4] == [22, 23]
    assert second.answer == [30, 31, 5, 6]
    assert second.tokens == first.tokens != media.tokens
    assert (shared(media, first), shared(media, second)) == (3, 3)


def test_requests_come_in_the_order_in_which_they_did(read):
    turns = read(
        HEADER,
        request(3, arrival=2.5, priority=7),
        request(1, arrival=0.5, salt="s"),
        request(2, arrival=2.5, tenant="t"),
        request(0, arrival=0.5),
    )
    assert [turn.arrival for turn in turns] == [0, 0, 2, 2]
    assert [turn.salt for turn in turns] == [None, "s", None, None]
    assert [(turn.tenant, turn.priority) for turn in turns[2:]] == [("t", 0), ("", 7)]


def test_what_was_never_admitted_is_not_sent_and_may_be_shared(read):
    gone = {k: v for k, v in request(0, output_length=0).items() if k != "cached"}
    first, second = read(
        HEADER, gone, request(1, of=0, shared=8), request(2, of=0, shared=6)
    )
    assert shared(first, second) == 6
    with pytest.raises(TraceError, match="holds no request"):
        read(HEADER, gone)


def test_in_a_closed_loop_what_goes_on_from_an_answer_waits_for_it(read):
    lines = (
        HEADER,
        request(0),
        request(1, of=0, shared=14, input_length=20),
        # The same prompt, and the same answer, are no next turn.
        request(2, of=0, shared=14),
        request(3, of=0, shared=10, input_length=20),
    )
    assert len(read(*lines)) == 4
    first, *others = read(*lines, closed_loop=True)
    assert len(others) == 2
    (turn,) = first.children
    assert turn.whole and len(turn.tokens) == 20


def test_the_fewest_tokens_count_no_answer_that_is_known(read):
    turns = read(
        HEADER,
        request(0),  # 10 of a prompt; 3 of an answer are cached when it ends
        request(1, of=0, shared=14, input_length=20),  # 20 - 13
        request(2, of=0, shared=14),  # 0: the same again
        request(3, of=0, shared=12, input_length=14),  # 14 - 12
        request(4, salt="s", input_length=6),
    )
    assert infinite_cache(turns) == 10 + 7 + 0 + 2 + 6
    flat, _ = known_in_advance(turns)
    assert sorted(map(len, (turn.answer for turn in flat))) == [4] * 5


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"vllm_radix_trace": 2, "server": {}}], "line 1: vllm_radix_trace is 2; all"),
        ([{"vllm_radix_trace": 1}], "line 1: server is missing; allowed: an object"),
        ([HEADER], "holds no request"),
        ([HEADER, request(1, of=0, shared=3)], "of is 0; allowed: a request of a line"),
        ([HEADER, request(0), request(1, of=0)], "line 3: shared is missing"),
        ([HEADER, request(0), request(1, shared=3)], "line 3: of is missing"),
        ([HEADER, request(0), request(1, of=0, shared=15)], "from 1 to 14"),
        ([HEADER, request(0), request(0)], "request is 0; allowed: one that no earlie"),
        ([HEADER, request(0, new_ids=[1])], "new_ids are 1; allowed: 14, one for each"),
        ([HEADER, request(0, new_ids=[])], "new_ids is []; allowed: a list, not empt"),
        ([HEADER, request(0, cached=11)], "cached is 11; allowed: an integer from 0 t"),
        ([HEADER, {"prompt": "a"}], "the format is plain, that of the first line is"),
    ],
)
def test_bad_lines_are_named(read, lines, words):
    with pytest.raises(TraceError) as raised:
        read(*lines)
    assert words in str(raised.value)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "t.jsonl"
    said = [[1] * 300, [1] * 200 + [2], [1] * 300 + [4] * 9, [3]]
    for tokens in (False, True):
        writer = TraceWriter(path, 1, 10_000, {"server": {}}, tokens)
        for number, one in enumerate(said):
            length = len(one) - number % 2
            length = max(1, length)
            writer.put(
                EndedRequest(
                    number, 0.0, encode(one), length, len(one) - length, "stop", 0
                )
            )
        writer.close()
        turns = load(path, None)
        assert [len(turn.tokens) for turn in turns] == [300, 200, 309, 1]
        assert [[shared(a, b) for a in turns] for b in turns] == [
            [300, 200, 300, 0],
            [200, 201, 200, 0],
            [300, 200, 309, 0],
            [0, 0, 0, 1],
        ]
        if tokens:
            read = [[*turn.tokens, *(turn.answer or ())] for turn in turns]
            assert read == said
