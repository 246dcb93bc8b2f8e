"""Traces: what is read, what is made up, and what is refused in which words."""

import gzip
import json
from zlib import crc32

import pytest

from vllm_radix_bench.traces.hashed_prompt import HashedPrompt
from vllm_radix_bench.traces.line import MAX_TOKEN, TraceError
from vllm_radix_bench.traces.load import load
from vllm_radix_bench.workloads.turn import Turn

BIG = 10**400
MOONCAKE = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}
PLAIN = {"token_ids": [5, 6], "output_length": 4}


def encode(text):
    return [3 + crc32(word.encode()) % 40_000 for word in text.split()]


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "trace.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts))
        return path

    return write_lines


def mooncake(**fields):
    return {**MOONCAKE, **fields}


def plain(**fields):
    return {**PLAIN, **fields}


def without(line, name):
    return {key: value for key, value in line.items() if key != name}


def test_mooncake(write):
    path = write(
        mooncake(timestamp=500),
        mooncake(timestamp=2000, input_length=1024, hash_ids=[0, 8], output_length=1),
        mooncake(timestamp=2500.5, input_length=1, hash_ids=[182789]),
    )
    turns = load(path, encode)
    assert [len(turn.tokens) for turn in turns] == [600, 1024, 1]
    assert [turn.max_tokens for turn in turns] == [3, 1, 3]
    assert [turn.arrival for turn in turns] == [0, 1.5, 2.0005]
    first, second, third = (list(turn.tokens) for turn in turns)
    assert first[:512] == second[:512]
    assert first[512] != second[512]
    assert first[513:] == second[513:600]
    assert third[0] not in (*first, *second)
    assert turns[0] == Turn(first, 3)


def test_plain(write):
    path = write(
        {"prompt": "two words", "output_length": 1},
        plain(arrival=1.5, session="s", tenant="t", priority=-2, salt="x"),
        plain(tenant="", token_ids=[0, MAX_TOKEN], arrival=2),
        plain(hints={"radix_keep_for": 9}, arrival=3),
    )
    assert load(path, encode) == [
        Turn(encode("two words"), 1),
        Turn([5, 6], 4, tenant="t", priority=-2, salt="x"),
        Turn([0, MAX_TOKEN], 4, arrival=0.5),
        Turn([5, 6], 4, arrival=1.5, hints={"radix_keep_for": 9}),
    ]


@pytest.mark.parametrize("start", [0, 1_700_000_000])
def test_a_line_without_a_time_comes_at_that_of_the_line_before(write, start):
    times = [None, start + 2, None, start + 1, None, None, start + 4]
    given = [{} if at is None else {"arrival": at} for at in times]
    path = write(*(plain(token_ids=[i], **one) for i, one in enumerate(given)))
    turns = load(path, encode)
    assert [(turn.tokens[0], turn.arrival) for turn in turns] == [
        (3, 0), (4, 0), (5, 0), (0, 1), (1, 1), (2, 1), (6, 3),
    ]  # fmt: skip
    said = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    chat = [said, {**said, "timestamp": start * 1000 + 500}, said,
            {**said, "session_id": "s", "delay": 9}, said,
            {**said, "timestamp": start * 1000 + 2000}]  # fmt: skip
    turns = load(write(*chat), encode, encode_chat=lambda messages, tools: [1])
    assert [turn.arrival for turn in turns] == [0, 0, 0, 0, 0, 1.5]


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1500, 1536])
def test_a_made_up_prompt_is_the_list_it_stands_for(length):
    ids = [4, 0, 9][: -(-length // 512)]
    whole = [token for one in ids for token in (1000 + one, *[1] * 511)][:length]
    prompt = HashedPrompt(ids, length, 512)
    assert list(prompt) == [*prompt] == prompt[:] == whole
    assert prompt == whole and whole == prompt
    assert len(prompt) == length
    assert [prompt[i] for i in range(length)] == whole
    assert [prompt[-i] for i in range(1, length + 1)] == whole[::-1]
    assert list(reversed(prompt)) == whole[::-1]
    for part in (slice(510, 515), slice(-3, None), slice(None, None, -7), slice(9, 2)):
        assert prompt[part] == whole[part]
    for index in (length, -length - 1):
        with pytest.raises(IndexError):
            prompt[index]
    assert 1000 + ids[-1] in prompt and 77 not in prompt


def test_made_up_prompts_compare_and_hash():
    prompt = HashedPrompt([1, 2], 600, 512)
    same = HashedPrompt([1, 2], 600, 512)
    assert prompt == same and hash(prompt) == hash(same)
    others = [([1, 3], 600, 512), ([1, 2], 601, 512), ([1, 2], 600, 511)]
    assert prompt not in [HashedPrompt(*other) for other in others]
    assert prompt not in ([1001], "prompt")
    assert repr(prompt) == "HashedPrompt(2 blocks, 600 tokens)"


def test_requests_come_in_order_of_arrival(write):
    path = write(
        plain(token_ids=[1], arrival=9),
        plain(token_ids=[2], arrival=7),
        plain(token_ids=[3], arrival=9),
        plain(token_ids=[4], arrival=7),
    )
    turns = load(path, encode)
    assert [(turn.tokens[0], turn.arrival) for turn in turns] == [
        (2, 0), (4, 0), (1, 2), (3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("rate", "last"), [(0.5, 8), (1.0, 4), (2.0, 2)])
def test_a_rate_of_two_is_twice_as_fast(write, rate, last):
    path = write(mooncake(timestamp=1000), mooncake(timestamp=5000))
    assert [t.arrival for t in load(path, encode, rate=rate)] == [0, last]


def test_lines_after_the_limit_are_not_read(write):
    path = write(plain(arrival=3), "", plain(arrival=1), "{")
    assert [t.arrival for t in load(path, encode, limit=2)] == [0, 2]
    with pytest.raises(TraceError, match="line 4"):
        load(path, encode)
    assert len(load(write(PLAIN), encode, limit=5)) == 1


def test_blank_lines_are_skipped(write):
    assert len(load(write("", PLAIN, "  ", PLAIN, ""), encode)) == 2


def test_a_closed_loop_chains_sessions(write):
    path = write(
        plain(token_ids=[1], arrival=1, session="a"),
        plain(token_ids=[2], arrival=2, session="b"),
        plain(token_ids=[1, 8, 9], arrival=5, session="a"),
        plain(token_ids=[3], arrival=4),
        plain(token_ids=[1, 8], arrival=3, session="a"),
        plain(token_ids=[3], arrival=6),
    )
    last = Turn([1, 8, 9], 4, arrival=4, whole=True)
    middle = Turn([1, 8], 4, [last], arrival=2, whole=True)
    assert load(path, encode, closed_loop=True) == [
        Turn([1], 4, [middle]),
        Turn([2], 4, arrival=1),
        Turn([3], 4, arrival=3),
        Turn([3], 4, arrival=5),
    ]
    turns = load(path, encode)
    assert [turn.arrival for turn in turns] == [0, 1, 2, 3, 4, 5]
    assert not any(turn.children or turn.whole for turn in turns)


@pytest.mark.parametrize("lines", [[MOONCAKE], [PLAIN, PLAIN]])
def test_a_closed_loop_needs_sessions(write, lines):
    with pytest.raises(TraceError, match="session is missing"):
        load(write(*lines), encode, closed_loop=True)


WRONG = [
    # What is in the file, and words of the message.
    ("{", ["is not JSON", "Expecting"]),
    ('{"prompt": ' + "[" * 100_000, ["is not JSON"]),
    ('{"token_ids": [' + "9" * 5000 + "]}", ["is not JSON"]),
    ("[1, 2]", ["JSON array", "one JSON object a line"]),
    ("null", ["is None", "one JSON object a line"]),
    (
        {},
        [
            "chat_id, hash_ids, prompt",
            "body and input are missing",
            "plain (prompt or token_ids)",
        ],
    ),
    (plain(colour=1, n=2), ["unknown field 'colour', 'n'", "prompt, token_ids, arr"]),
    (mooncake(arrival=1), ["unknown field 'arrival'", "timestamp, input_length"]),
    (mooncake(prompt="a"), ["unknown field 'prompt'"]),
    (plain(prompt="a"), ["prompt and token_ids are both given", "one of them"]),
    *[(mooncake(hash_ids=value), ["hash_ids is"]) for value in ([], 3, "07", None)],
    *[
        (mooncake(hash_ids=[0, value]), [f"hash_ids[1] is {value!r}", "from 0 to"])
        for value in (-1, 1.0, True, None, "7", [], (1 << 30) - 1000)
    ],
    *[
        (mooncake(input_length=value), ["input_length is", "allowed: "])
        for value in (0, -5, True, 600.0, "600", None, 512, 1025, BIG)
    ],
    (mooncake(input_length=512), ["is 512 with 2 hash_ids", "513 to 1024"]),
    *[
        (line(output_length=value), ["output_length is", "an integer from 1 to"])
        for line in (mooncake, plain)
        for value in (0, -1, True, 2.0, "2", None, [2], 1_000_001, BIG)
    ],
    *[
        (line(**{name: value}), [f"{name} is", "a finite number of", "0 or more"])
        for line, name in ((mooncake, "timestamp"), (plain, "arrival"))
        for value in (-1, -0.5, True, "0", None, float("nan"), float("inf"), BIG)
    ],
    (
        plain(arrival=1.1e16),
        ["arrival is 1.1e+16", "of seconds, 0 or more, up to 1e+12"],
    ),
    (mooncake(timestamp=1.1e16), ["timestamp is 1.1e+16", "up to 1e+15"]),
    *[
        (without(MOONCAKE, name), [f"{name} is missing", "allowed: "])
        for name in ("timestamp", "input_length", "output_length")
    ],
    *[(plain(token_ids=value), ["token_ids is"]) for value in ([], 3, "07", None, {})],
    *[
        (plain(token_ids=[1, 2, value]), [f"token_ids[2] is {value!r}", "from 0 to"])
        for value in (-1, 1.0, True, None, "7", 1 << 30)
    ],
    *[
        ({"prompt": value, "output_length": 1}, ["prompt is", "allowed: "])
        for value in ("", "  ", 3, None, ["a"], "\ud800")
    ],
    *[
        (plain(**{name: value}), [f"{name} is {value!r}", "a string"])
        for name in ("session", "tenant", "salt")
        for value in (1, None, True, ["a"], "\udfff")
    ],
    *[(plain(**{name: ""}), [f"{name} is ''"]) for name in ("session", "salt")],
    *[
        (plain(priority=value), ["priority is", "an integer"])
        for value in (1.0, "1", None, False, 1 << 63)
    ],
    (plain(hints=3), ["hints is 3", "an object"]),
    (plain(hints={"radix_keep": 3}), ["unknown field 'radix_keep'", "radix_keep_for"]),
    (plain(hints={"radix_keep_for": 0}), ["hints: radix_keep_for: 0 is not a number"]),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_wrong_lines_are_refused_in_words(write, line, words):
    good = MOONCAKE if "hash_ids" in line else PLAIN
    for lines in ([line], [good, "", line, good]):
        if line == "[1, 2]" and len(lines) > 1:
            words = ["is [1, 2]", "one JSON object a line"]
        path = write(*lines)
        with pytest.raises(TraceError) as raised:
            load(path, encode)
        message = str(raised.value)
        assert message.startswith(f"{path}, line {1 if len(lines) == 1 else 3}: ")
        assert "; allowed: " in message
        assert len(message) < len(str(path)) + 400
        for word in words:
            assert word in message


@pytest.mark.parametrize(("first", "second"), [(PLAIN, MOONCAKE), (MOONCAKE, PLAIN)])
def test_formats_do_not_mix(write, first, second):
    with pytest.raises(TraceError, match=r"line 2: the format is .*; allowed: one"):
        load(write(first, second), encode)


def test_files_that_are_none(tmp_path):
    missing, empty, binary = (tmp_path / name for name in ("no", "empty", "binary"))
    empty.write_text("\n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (missing, "cannot be read (No such file or directory)"),
        (tmp_path, "cannot be read (Is a directory)"),
        (empty, "holds no request"),
        (binary, "line 1: is not JSON"),
    ):
        with pytest.raises(TraceError) as raised:
            load(path, encode)
        assert str(path) in str(raised.value)
        assert words in str(raised.value)
        assert "; allowed: " in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *[({"rate": r}, "rate is") for r in (0, -1.0, float("nan"), float("inf"))],
        ({"rate": 5e-324}, "rate is 5e-324: the last request"),
        *[({"limit": n}, f"limit is {n}") for n in (0, -3)],
    ],
)
def test_wrong_arguments_are_refused(write, options, words):
    path = write(plain(arrival=0), plain(arrival=1e12))
    with pytest.raises(TraceError, match=words):
        load(path, encode, **options)


def test_gzip_and_a_byte_order_mark_are_read(tmp_path):
    text = b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\n"
    for name, raw in (("a", text), ("a.gz", gzip.compress(text))):
        path = tmp_path / name
        path.write_bytes(raw)
        assert load(path, encode) == [Turn([5, 6], 4)]
    path.write_bytes(gzip.compress(text[3:] * 1000)[:-20])
    with pytest.raises(TraceError, match="cannot be read"):
        load(path, encode)
    path.write_bytes(gzip.compress(text)[:12] + b"\xff" * 30)
    with pytest.raises(TraceError, match="cannot be read"):
        load(path, encode)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Timestamp,Request tokens\n5,472\n", "CSV with lengths only: no prompts"),
        ('"TIMESTAMP","ContextTokens"\n', "CSV with lengths only: no prompts"),
        ("prompt,max_tokens\nhello,3\n", "is CSV; allowed: one JSON object a line"),
        ('[{"id": "x", "conversations": []}]', "begins a JSON array, as ShareGPT's"),
        ('[\n {"id": "x"}\n]\n', "begins a JSON array, as ShareGPT's"),
        ('{\n "prompt": "a"\n}\n', "is not JSON"),
    ],
)
def test_other_kinds_of_files_are_refused_with_what_is_read(tmp_path, text, words):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError) as raised:
        load(path, encode)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 1: ") and words in message
    assert "allowed: one JSON object a line" in message


def test_a_length_that_no_line_names_can_be_given(write):
    path = write({"prompt": "two words"}, {"prompt": "two", "output_tokens": 3})
    assert [turn.max_tokens for turn in load(path, encode)] == [256, 3]
    assert load(path, encode, output_length=9)[0].max_tokens == 9


def bailian(chat, parent, at, ids):
    return {"chat_id": chat, "parent_chat_id": parent, "timestamp": at,
            "input_length": 16 * len(ids), "output_length": 4,
            "hash_ids": ids}  # fmt: skip


def test_bailian(write):
    path = write(
        bailian(5, -1, 0.5, [1, 2]),
        bailian(7, 5, 3, [1, 2, 3]),
        bailian(6, 99, 2, [1, 9]),
        bailian(8, 5, 4, [1, 2, 4]),
    )
    opened = load(path, encode)
    assert [turn.arrival for turn in opened] == [0, 1.5, 2.5, 3.5]
    assert not any(turn.children or turn.whole for turn in opened)
    first, other = (list(turn.tokens) for turn in opened[:2])
    assert first[:16] == other[:16] and first[16] != other[16] and len(first) == 32
    root, orphan = load(path, encode, closed_loop=True)
    assert [child.arrival for child in root.children] == [2.5, 3.5]
    assert all(child.whole for child in root.children)
    assert orphan.arrival == 1.5 and not orphan.children


def test_a_bailian_line_has_an_id_of_its_own(write):
    path = write(bailian(5, -1, 0, [1]), bailian(6, -1, 1, [1]), bailian(5, 6, 2, [1]))
    with pytest.raises(TraceError, match=r"line 3: chat_id is 5; allowed: one that no"):
        load(path, encode)


def test_a_bailian_line_whose_parent_comes_later_begins_a_session(write):
    path = write(bailian(1, 2, 0, [1]), bailian(2, 1, 1, [1]), bailian(3, 3, 2, [1]))
    first, alone = load(path, encode, closed_loop=True)
    assert [child.arrival for child in first.children] == [1]
    assert (alone.arrival, alone.children) == (2, [])


def in_session(at=None, session="a", **fields):
    fields = {"output_length": 3, "session_id": session, **fields}
    return fields if at is None else {**fields, "timestamp": at}


def test_mooncake_s_sessions_are_whole_prompts_or_what_each_line_adds(write):
    path = write(
        in_session(500, input_length=600, hash_ids=[1, 2]),
        in_session(1500, "b", input_length=512, hash_ids=[1]),
        in_session(delay=100, input_length=1100, hash_ids=[1, 2, 3]),
        in_session(delay=200, session="b", input_length=40, hash_ids=[9]),
        in_session(3500, "b", input_length=30, hash_ids=[10]),
    )
    for closed_loop in (False, True):
        whole, adds = load(path, encode, closed_loop=closed_loop, rate=2)
        (second,) = whole.children
        assert (second.whole, second.delay, second.arrival) == (True, 0.05, 0)
        assert adds.arrival == 0.5
        (second,) = adds.children
        assert (second.whole, second.delay, len(second.tokens)) == (False, 0.1, 40)
        (third,) = second.children
        # It needs the answer before it, though it has a time of its own.
        assert (third.whole, third.delay, third.arrival) == (False, 0, 1.5)


def test_whole_prompts_with_times_wait_for_nothing_in_an_open_loop(write):
    path = write(
        in_session(0, input_length=600, hash_ids=[1, 2]),
        in_session(1000, input_length=1100, hash_ids=[1, 2, 3], delay=100),
    )
    assert [turn.arrival for turn in load(path, encode)] == [0, 1]
    (root,) = load(path, encode, closed_loop=True)
    # Its own time counts, not how long it was after the answer before it.
    assert (root.children[0].arrival, root.children[0].delay) == (1, 0)


def test_the_first_of_a_session_waits_for_no_delay(write):
    path = write(in_session(0, input_length=600, hash_ids=[1, 2], delay=10_000))
    assert [turn.delay for turn in load(path, encode)] == [0]
    path = write(in_session(input_length=600, hash_ids=[1, 2], delay=10_000))
    assert [turn.delay for turn in load(path, encode)] == [0]


def test_agentic_sessions_begin_at_once_and_wait_for_answers(write):
    def said(session, gap, *texts):
        messages = [{"role": "user", "content": text} for text in texts]
        return {"session_id": session, "input": messages, "output_length": 2,
                "pre_gap": gap}  # fmt: skip

    path = write(said("a", 0, "x"), said("a", 1.5, "x", "y"), said("b", 0, "z"))
    roots = load(path, encode, encode_chat=lambda messages, tools: [1] * len(messages))
    assert roots == [
        Turn([1], 2, [Turn([1, 1], 2, delay=1.5, whole=True)]),
        Turn([1], 2),
    ]


def test_seconds_and_milliseconds_do_not_mix(write):
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    path = write({**chat, "arrival": 1}, {**chat, "timestamp": 1000})
    with pytest.raises(TraceError, match="in seconds in some lines and in milli"):
        load(path, encode, encode_chat=lambda messages, tools: [1])
