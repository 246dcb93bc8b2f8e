"""What a client may say of a request's cache: fields ``radix_...`` of ``vllm_xargs``.

Hints are a bias and not a lock: they reorder what is evicted among blocks that no
request holds or waits for.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PREFIX = "radix_"
"""Of the names of all hints in ``vllm_xargs``."""

LONGEST = 86_400.0
"""Seconds for which a hint may hold, at most: a day."""

LEVELS = {"low": -5, "normal": 0, "high": 5}
"""Priorities by name."""

MOST_PRIORITY = 10


class Hints(NamedTuple):
    """What the client of a request has said.

    Attributes:
        end_session: when the request has ended, what only its session has used goes
            first.
        expect_in: its session comes back in about so many seconds. Its blocks stay
            longer than others until then and half as long again, at least 5 seconds.
        keep_for: its blocks stay longer than others for so many seconds.
        priority: above 0 its blocks stay longer than others, the higher the longer: for
            as long as the fields above say, else for 300 seconds. Below 0, what only
            its session has used goes before others.
        replaces: the ``id`` of an earlier response, from which the conversation was
            rewritten: what only that branch has used goes first.
    """

    end_session: bool = False
    expect_in: float = 0.0
    keep_for: float = 0.0
    priority: int = 0
    replaces: str = ""


class HintError(ValueError):
    """A hint is wrong; the message names the field and what is allowed.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def parse_hints(extra_args: Mapping[str, Any] | None) -> Hints | None:
    """Return the hints among a request's extra arguments; None if there are none.

    Args:
        extra_args: ``vllm_xargs`` of the request, other people's fields included.

    Raises:
        HintError: a field that begins as a hint is unknown, or its value is wrong, or
            two of them contradict each other.
    """
    if not extra_args:
        return None
    given = {n: v for n, v in extra_args.items() if str(n).startswith(PREFIX)}
    if not given:
        return None
    values: dict[str, Any] = {}
    for field, value in given.items():
        reader = READERS.get(field)
        if reader is None:
            raise HintError(
                field, f"unknown field {field!r}; hints are {', '.join(READERS)}"
            )
        values[field.removeprefix(PREFIX)] = reader(field, value)
    hints = Hints(**values)
    for first, given_first in (
        ("end_session", hints.end_session),
        ("priority below 0", hints.priority < 0),
    ):
        for name in ("expect_in", "keep_for"):
            if given_first and getattr(hints, name):
                raise HintError(
                    PREFIX + name,
                    f"{PREFIX}{name} and {PREFIX}{first} contradict each other: "
                    "give one of them",
                )
    if hints.end_session and hints.priority > 0:
        raise HintError(
            f"{PREFIX}priority",
            f"{PREFIX}priority above 0 and {PREFIX}end_session contradict each other: "
            "give one of them",
        )
    return hints


def portable_hints(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the hints of a request as they were given, for another run of it.

    Without ``radix_replaces``, which names a response of this run; and none where
    they are wrong.
    """
    given = extra_args or {}
    try:
        parse_hints(given)
    except HintError:
        return {}
    kept = (field for field in READERS if field != f"{PREFIX}replaces")
    return {field: given[field] for field in kept if field in given}


def _switch(field: str, value: object) -> bool:
    # vLLM's front end turns true into 1, for its type of vllm_xargs has no booleans.
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise HintError(field, f"{field}: {value!r} is not one of true, false")


def _seconds(field: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 < value <= LONGEST:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise HintError(
        field,
        f"{field}: {value!r} is not a number of seconds above 0, up to {LONGEST:.0f}",
    )


def _priority(field: str, value: object) -> int:
    if isinstance(value, str) and value in LEVELS:
        return LEVELS[value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and abs(value) <= MOST_PRIORITY and value == int(value):  # type: ignore
        return int(value)  # type: ignore[call-overload,no-any-return]
    raise HintError(
        field,
        f"{field}: {value!r} is not a whole number from {-MOST_PRIORITY} to "
        f"{MOST_PRIORITY}, or one of {', '.join(LEVELS)}",
    )


def _response(field: str, value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise HintError(field, f"{field}: {value!r} is not the id of a response")


READERS: dict[str, Callable[[str, object], Any]] = {
    "radix_end_session": _switch,
    "radix_expect_in": _seconds,
    "radix_keep_for": _seconds,
    "radix_priority": _priority,
    "radix_replaces": _response,
}
"""What reads the value of each hint."""
