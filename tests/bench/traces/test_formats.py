"""The contract of trace formats: each one registered keeps it."""

import json

import pytest

from vllm_radix_bench.traces.format import ReadOptions
from vllm_radix_bench.traces.formats import FORMATS, format_of, markdown_table
from vllm_radix_bench.traces.line import Line, TraceError

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "?"},
]
OF_A_REQUEST = {"tenant": "t", "priority": -2, "salt": "x", "hints": {}}

SAMPLES = [
    ("plain", {"prompt": "two words", "output_length": 4, "arrival": 1.5,
               "session": "s", **OF_A_REQUEST}),
    ("plain", {"token_ids": [5, 6], "max_tokens": 4, "session_id": "s"}),
    # vLLM's custom datasets.
    ("plain", {"prompt": "two words", "output_tokens": 4}),
    ("plain", {"prompt": "two words"}),
    ("chat", {"messages": MESSAGES, "tools": [{"type": "function"}], "max_tokens": 4,
              "arrival": 1.5, "session": "s", **OF_A_REQUEST}),
    ("chat", {"messages": MESSAGES, "max_completion_tokens": 4, "timestamp": 1500,
              "session_id": "s", "delay": 20}),
    ("openai-batch", {"body": {"messages": MESSAGES, "max_tokens": 4}}),
    ("bailian", {"chat_id": 160, "parent_chat_id": 159, "timestamp": 66.2,
                 "input_length": 30, "output_length": 9, "hash_ids": [1089, 7]}),
    ("mooncake", {"timestamp": 27000, "input_length": 600, "output_length": 3,
                  "hash_ids": [0, 7]}),
    ("mooncake", {"session_id": "s", "delay": 20, "input_length": 600,
                  "output_length": 3, "hash_ids": [0, 7]}),
    ("agentic", {"session_id": "s", "input": MESSAGES, "output_length": 4,
                 "pre_gap": 1.5}),
    ("recorded", {"vllm_radix_trace": 1, "server": {"blocks": 7}, "request": 5,
                  "arrival": 1.5, "input_length": 8, "output_length": 4, "of": 0,
                  "shared": 10, "new_ids": [5, 6], "cached": 7, **OF_A_REQUEST}),
]  # fmt: skip
"""Lines of each format."""

BY_NAME = {one.name: one for one in FORMATS}
EACH = pytest.mark.parametrize(
    ("trace_format", "sample"),
    [(BY_NAME[name], fields) for name, fields in SAMPLES],
    ids=[f"{name}-{number}" for number, (name, _) in enumerate(SAMPLES)],
)
OPTIONS = ReadOptions(
    lambda text: list(text.encode()),
    lambda messages, tools: list(json.dumps([messages, tools]).encode()),
    output_length=77,
)


def line_of(fields):
    return Line.parse("t.jsonl, line 7", json.dumps(fields).encode())


# What other lines of its format go on from.
FIRST = {"request": 0, "arrival": 0, "input_length": 20, "output_length": 0}
BY_NAME["recorded"].read(line_of(FIRST), OPTIONS)


def test_every_format_has_a_sample_and_a_name_of_its_own():
    assert len(BY_NAME) == len(FORMATS)
    assert {name for name, _ in SAMPLES} == set(BY_NAME)
    marks = [mark for one in FORMATS for mark in one.marks]
    assert len(set(marks)) == len(marks)
    for one in FORMATS:
        assert set(one.marks) <= set(one.fields)
        assert not set(one.fields) & set(one.ignored)


def test_every_field_of_a_format_is_in_a_sample():
    aliases = {"output_tokens", "max_tokens", "max_completion_tokens", "session_id"}
    for one in FORMATS:
        used = {field for name, line in SAMPLES if name == one.name for field in line}
        assert set(one.fields) - used <= {*aliases, "output_length", "session", "tools"}


@EACH
def test_a_format_recognises_its_own_sample(trace_format, sample):
    assert format_of(line_of(sample)) is trace_format


@EACH
def test_a_format_reads_its_sample(trace_format, sample):
    assert set(sample) <= set(trace_format.fields)
    request = trace_format.read(line_of(sample), OPTIONS)
    assert len(request.turn.tokens) > 0
    lengths = {name: n for name, n in sample.items() if n in (3, 4, 9)}
    if trace_format.name == "openai-batch":
        lengths = {"max_tokens": 4}
    assert request.turn.max_tokens == next(iter(lengths.values()), 77)
    assert request.units > 0
    assert request.turn.arrival == 0
    assert request.session == sample.get("session", sample.get("session_id"))
    given = sample.keys() & {"arrival", "timestamp"}
    assert (request.at or 0) == (sample[given.pop()] if given else 0)


@EACH
def test_errors_name_the_line_and_the_field(trace_format, sample):
    for name in sample:
        # No field is a bool: it is neither a number, nor a text, nor a list.
        with pytest.raises(TraceError) as raised:
            trace_format.read(line_of({**sample, name: False}), OPTIONS)
        message = str(raised.value)
        assert message.startswith(f"t.jsonl, line 7: {name} is False; allowed: ")


@EACH
def test_unknown_fields_are_refused_with_those_that_are_known(trace_format, sample):
    line = line_of({**sample, "colour": 1})
    with pytest.raises(TraceError) as raised:
        trace_format.read(line, OPTIONS)
    message = str(raised.value)
    assert message.startswith("t.jsonl, line 7: unknown field 'colour'; allowed: ")
    assert message.endswith(", ".join((*trace_format.fields, *trace_format.ignored)))


@EACH
def test_fields_that_do_not_matter_are_let_by(trace_format, sample):
    ignored = dict.fromkeys(trace_format.ignored, 1)
    read = trace_format.read(line_of({**sample, **ignored}), OPTIONS)
    assert read == trace_format.read(line_of(sample), OPTIONS)


def test_a_line_of_no_format_is_refused_with_all_of_them():
    with pytest.raises(TraceError) as raised:
        format_of(line_of({"colour": 1}))
    for one in FORMATS:
        assert one.describe() in str(raised.value)


def test_the_table_has_a_row_of_each_format_with_all_fields():
    head, rule, *rows = markdown_table().splitlines()
    assert head == "| format | fields |" and rule == "|---|---|"
    for one, row in zip(FORMATS, rows, strict=True):
        assert row.startswith(f"| {one.name} | ") and row.count("|") == 3
        assert all(f"`{name}`" in row for name in one.fields)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [{"content": "?"}]}, "messages[0].role is missing"),
        ({"messages": ["?"]}, "messages[0] is '?'"),
        ({"messages": []}, "messages is []"),
        (
            {"messages": [{"role": "user", "content": [{"image_url": "u"}]}]},
            "messages[0].content[0].text is missing",
        ),
        ({"body": {"model": "m"}}, "body.messages is missing"),
        ({"body": {"messages": [{"role": 3}]}}, "body.messages[0].role is 3"),
        ({"body": {"prompt": [1, -1]}}, "body.prompt[1] is -1"),
        ({"body": {"prompt": "a", "max_tokens": 0}}, "body.max_tokens is 0"),
        (
            {"body": {"prompt": "a", "messages": MESSAGES}},
            "body.messages and body.prompt are both given",
        ),
        ({"prompt": "a", "max_tokens": 1, "output_tokens": 1}, "are both given"),
        ({"prompt": "a", "session": "a", "session_id": "a"}, "are both given"),
        ({"messages": MESSAGES, "delay": 1}, "session_id is missing"),
        ({"messages": MESSAGES, "arrival": 1, "timestamp": 1}, "are both given"),
        (
            {"hash_ids": [1], "input_length": 1, "output_length": 1, "delay": 1},
            "session_id is missing",
        ),
        (
            {"chat_id": 1, "hash_ids": [1, 2], "input_length": 33},
            "input_length is 33 with 2 hash_ids; allowed: 17 to 32",
        ),
        ({"input": MESSAGES}, "session_id is missing"),
    ],
)
def test_what_is_inside_is_named(line, words):
    with pytest.raises(TraceError) as raised:
        format_of(line_of(line)).read(line_of(line), OPTIONS)
    assert str(raised.value).startswith("t.jsonl, line 7: ")
    assert words in str(raised.value) and "; allowed: " in str(raised.value)


@pytest.mark.parametrize(
    "line", [{"messages": MESSAGES}, {"body": {"messages": MESSAGES}}]
)
def test_messages_need_a_tokenizer_and_what_it_refuses_is_named(line):
    def refuses(messages, tools):
        raise TypeError("roles must\nalternate")

    def nothing(messages, tools):
        return []

    for encode_chat, words in (
        (None, "messages needs a chat template to be a prompt; allowed: with --tokeni"),
        (refuses, "messages cannot be made a prompt (roles must alternate); allowed: "),
        (nothing, "allowed: messages of at least one token"),
    ):
        options = ReadOptions(OPTIONS.encode, encode_chat)
        with pytest.raises(TraceError) as raised:
            format_of(line_of(line)).read(line_of(line), options)
        assert words in str(raised.value)


def test_contents_become_one_text_and_nulls_do_not_matter():
    seen = []
    options = ReadOptions(OPTIONS.encode, lambda *both: seen.append(both) or [1])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    body = {"messages": [{"role": "user", "content": parts}, call], "max_tokens": None}
    turn = (
        format_of(line_of({"body": body})).read(line_of({"body": body}), options).turn
    )
    assert (turn.tokens, turn.max_tokens) == ([1], options.output_length)
    said = {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}
    assert seen == [([{"role": "user", "content": "a\nb"}, said], None)]
    body = {"prompt": [5, 6], "cache_salt": "x", "priority": 3}
    turn = (
        format_of(line_of({"body": body})).read(line_of({"body": body}), options).turn
    )
    assert (turn.tokens, turn.salt, turn.priority) == ([5, 6], "x", 3)
