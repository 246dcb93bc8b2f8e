"""The contract of trace formats: each one registered keeps it."""

import json

import pytest

from vllm_radix_bench.traces.formats import FORMATS, format_of
from vllm_radix_bench.traces.line import Line, TraceError

SAMPLES = {
    "mooncake": {
        "timestamp": 27000,
        "input_length": 600,
        "output_length": 3,
        "hash_ids": [0, 7],
    },
    "plain": {
        "prompt": "two words",
        "output_length": 4,
        "arrival": 1.5,
        "session": "s",
        "tenant": "t",
        "priority": -2,
        "salt": "x",
    },
}
"""A line of each format, with every field but those that another one excludes."""

EACH = pytest.mark.parametrize("trace_format", FORMATS, ids=lambda one: one.name)


def encode(text):
    return list(text.encode())


def line_of(fields):
    return Line("t.jsonl, line 7", json.dumps(fields).encode())


def test_every_format_has_a_sample_and_a_name_of_its_own():
    names = [one.name for one in FORMATS]
    assert sorted(names) == sorted(SAMPLES)
    marks = [mark for one in FORMATS for mark in one.marks]
    assert len(set(marks)) == len(marks)


@EACH
def test_a_format_recognises_its_own_sample_and_no_other(trace_format):
    for name, fields in SAMPLES.items():
        assert trace_format.sniff(line_of(fields)) == (name == trace_format.name)
    assert format_of(line_of(SAMPLES[trace_format.name])) is trace_format


@EACH
def test_a_format_reads_its_sample(trace_format):
    sample = SAMPLES[trace_format.name]
    assert set(sample) <= set(trace_format.fields)
    request = trace_format.read(line_of(sample), encode)
    assert len(request.turn.tokens) > 0
    assert request.turn.max_tokens > 0
    assert request.at > 0 and request.units > 0
    assert request.turn.arrival == 0
    assert request.session == sample.get("session")


@EACH
def test_errors_name_the_line_and_the_field(trace_format):
    sample = SAMPLES[trace_format.name]
    for name in sample:
        # No field is an object: neither a number, nor a text, nor a list.
        with pytest.raises(TraceError) as raised:
            trace_format.read(line_of({**sample, name: {}}), encode)
        message = str(raised.value)
        assert message.startswith(f"t.jsonl, line 7: {name} is {{}}; allowed: ")


@EACH
def test_unknown_fields_are_refused_with_those_that_are_known(trace_format):
    line = line_of({**SAMPLES[trace_format.name], "colour": 1})
    with pytest.raises(TraceError) as raised:
        trace_format.read(line, encode)
    message = str(raised.value)
    assert message.startswith("t.jsonl, line 7: unknown field 'colour'; allowed: ")
    assert message.endswith(", ".join(trace_format.fields))


def test_a_line_of_no_format_is_refused_with_all_of_them():
    with pytest.raises(TraceError) as raised:
        format_of(line_of({"colour": 1}))
    for one in FORMATS:
        assert one.describe() in str(raised.value)
