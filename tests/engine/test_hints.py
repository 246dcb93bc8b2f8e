"""Hints: what is read from ``vllm_xargs``, and what is refused."""

import pytest

from vllm_radix.engine.hints import HintError, Hints, parse_hints


@pytest.mark.parametrize("extra", [None, {}, {"tenant": "one", "kv": [1, 2]}])
def test_requests_without_hints_have_none(extra):
    assert parse_hints(extra) is None


@pytest.mark.parametrize(
    ("extra", "hints"),
    [
        ({"radix_end_session": True}, Hints(end_session=True)),
        # vLLM's front end makes numbers of booleans.
        ({"radix_end_session": 1}, Hints(end_session=True)),
        ({"radix_end_session": 0, "tenant": "x"}, Hints()),
        ({"radix_expect_in": 3}, Hints(expect_in=3.0)),
        ({"radix_keep_for": 0.5}, Hints(keep_for=0.5)),
        ({"radix_keep_for": 86400}, Hints(keep_for=86400.0)),
        ({"radix_priority": -10}, Hints(priority=-10)),
        ({"radix_priority": 10.0}, Hints(priority=10)),
        ({"radix_priority": "low"}, Hints(priority=-5)),
        ({"radix_priority": "high"}, Hints(priority=5)),
        ({"radix_replaces": "chatcmpl-1"}, Hints(replaces="chatcmpl-1")),
    ],
)
def test_hints_are_read(extra, hints):
    assert parse_hints(extra) == hints


@pytest.mark.parametrize(
    ("extra", "field", "allowed"),
    [
        ({"radix_end": True}, "radix_end", "hints are radix_end_session, radix_exp"),
        ({"radix_end_session": "yes"}, "radix_end_session", "one of true, false"),
        ({"radix_end_session": 2}, "radix_end_session", "one of true, false"),
        ({"radix_expect_in": 0}, "radix_expect_in", "above 0, up to 86400"),
        ({"radix_expect_in": float("nan")}, "radix_expect_in", "above 0"),
        ({"radix_keep_for": -1}, "radix_keep_for", "above 0, up to 86400"),
        ({"radix_keep_for": 86401}, "radix_keep_for", "above 0, up to 86400"),
        ({"radix_keep_for": True}, "radix_keep_for", "above 0, up to 86400"),
        ({"radix_keep_for": [1]}, "radix_keep_for", "above 0, up to 86400"),
        ({"radix_priority": 11}, "radix_priority", "from -10 to 10, or one of low"),
        ({"radix_priority": 0.5}, "radix_priority", "from -10 to 10"),
        ({"radix_priority": float("nan")}, "radix_priority", "from -10 to 10"),
        ({"radix_priority": "urgent"}, "radix_priority", "low, normal, high"),
        ({"radix_replaces": ""}, "radix_replaces", "the id of a response"),
        ({"radix_replaces": 7}, "radix_replaces", "the id of a response"),
        (
            {"radix_end_session": 1, "radix_expect_in": 5},
            "radix_expect_in",
            "contradict each other",
        ),
        (
            {"radix_keep_for": 5, "radix_priority": "low"},
            "radix_keep_for",
            "radix_priority below 0 contradict each other",
        ),
        (
            {"radix_keep_for": 5, "radix_end_session": True},
            "radix_keep_for",
            "contradict each other",
        ),
    ],
)
def test_a_wrong_hint_is_refused_by_its_name(extra, field, allowed):
    with pytest.raises(HintError) as refused:
        parse_hints(extra)
    assert refused.value.field == field
    assert field in str(refused.value) and allowed in str(refused.value)
