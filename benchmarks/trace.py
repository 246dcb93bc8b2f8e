"""Request traces: JSON lines, read into turns to be replayed.

A trace is of one of two formats. Mooncake's holds lengths and, for each 512 tokens
of a prompt, an id: equal ids mean equal prefixes. From these, prompts are made up
that share what the ids share. The plain format holds the prompts, as text or tokens.
"""

import json
import math
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn

HASHED_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's ids stands for."""

MOST_TOKEN = (1 << 30) - 1
"""The largest token of a prompt; a replay makes up answers from larger ones."""

MOST_OUTPUT = 1_000_000
"""The largest ``output_length``: beyond any model, and answers are kept in memory."""

_FILL = 1
"""Token of a made-up block, but for its first."""

_FIRST = 1000
"""First token of the made-up block whose id is 0; others count up from it."""

_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_PLAIN = (
    "prompt",
    "token_ids",
    "arrival",
    "output_length",
    "session",
    "tenant",
    "priority",
    "salt",
)


class TraceError(ValueError):
    """A trace cannot be used; the message says where, what, and what is allowed."""


class HashedPrompt(Sequence[int]):
    """A made-up prompt, equal to another's as far as their ids are.

    Keeps a number for each block and makes the tokens when they are asked for:
    a trace of a hundred million tokens takes a few megabytes.

    Args:
        hash_ids: of the blocks, up to ``MOST_TOKEN - 1000``.
        length: tokens of the prompt; the last block may be shorter than the others.
    """

    __slots__ = ("_firsts", "_length")

    def __init__(self, hash_ids: Iterable[int], length: int) -> None:
        self._firsts = array("i", (_FIRST + one for one in hash_ids))
        self._length = length

    def _tokens(self) -> list[int]:
        tokens = [_FILL] * self._length
        tokens[::HASHED_TOKENS] = self._firsts
        return tokens

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._tokens()[index]
        block, inside = divmod(range(self._length)[index], HASHED_TOKENS)
        return _FILL if inside else self._firsts[block]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, HashedPrompt):
            return self._length == other._length and self._firsts == other._firsts
        if isinstance(other, list):
            return self._tokens() == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self._length, self._firsts.tobytes()))

    def __repr__(self) -> str:
        return f"HashedPrompt({len(self._firsts)} blocks, {self._length} tokens)"


@dataclass
class _Request:
    """A line that has been read.

    Attributes:
        at: when it came, in units of the trace.
        units: of the trace in a second.
        session: that it is part of.
        turn: the request; its arrival is not set.
    """

    at: float
    units: int
    session: str | None
    turn: Turn


class _Line:
    """One line, and what may be asked of it; all raise ``TraceError``.

    Args:
        where: file and line, for messages.
        raw: the line.
    """

    def __init__(self, where: str, raw: bytes) -> None:
        self._where = where
        try:
            fields = json.loads(raw.decode())
        # Of these, UnicodeDecodeError and JSONDecodeError are ValueErrors; so is
        # what an integer of thousands of digits raises.
        except (ValueError, RecursionError) as error:
            raise self._error(f"is not JSON ({error})", "an object") from error
        if not isinstance(fields, dict):
            raise self._error(f"is {reprlib.repr(fields)}", "an object")
        self._fields: dict[str, Any] = fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def _error(self, what: str, allowed: str) -> TraceError:
        return TraceError(f"{self._where}: {what}; allowed: {allowed}")

    def is_mooncake(self) -> bool:
        """Return which of the two formats this is."""
        if not any(name in self for name in ("hash_ids", "prompt", "token_ids")):
            raise self._error(
                "hash_ids, prompt and token_ids are missing",
                f"the fields {', '.join(_MOONCAKE)}; or {', '.join(_PLAIN)}, with "
                "one of prompt and token_ids",
            )
        return "hash_ids" in self

    def check_format(self, mooncake: bool) -> None:
        """Check that this line is like the first one."""
        if self.is_mooncake() != mooncake:
            names = ("plain", "Mooncake's")
            raise self._error(
                f"the format is {names[not mooncake]}, that of the first line is "
                f"{names[mooncake]}",
                "one format in a file",
            )

    def check_names(self, allowed: tuple[str, ...]) -> None:
        """Check that no field is unknown."""
        unknown = [reprlib.repr(name) for name in self._fields if name not in allowed]
        if unknown:
            some = ", ".join(unknown[:8])
            raise self._error(f"unknown field {some}", ", ".join(allowed))

    def _get(self, name: str, allowed: str) -> Any:
        if name not in self:
            raise self._error(f"{name} is missing", allowed)
        return self._fields[name]

    def _wrong(self, name: str, value: object, allowed: str) -> TraceError:
        return self._error(f"{name} is {reprlib.repr(value)}", allowed)

    def integer(self, name: str, least: int, most: int) -> int:
        """Return a whole number; a bool is none."""
        allowed = f"an integer from {least} to {most}"
        value = self._get(name, allowed)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, allowed)
        return value

    def seconds(self, name: str, unit: str) -> float:
        """Return a time, as it stands."""
        allowed = f"a finite number of {unit}, 0 or more"
        value = self._get(name, allowed)
        try:
            good = type(value) in (int, float) and 0 <= float(value) < math.inf
        except OverflowError:
            good = False
        if not good:
            raise self._wrong(name, value, allowed)
        time: float = value
        return time

    def text(self, name: str, *, empty: bool = False) -> str:
        """Return a text."""
        allowed = "a string" if empty else "a string, not empty"
        value = self._get(name, allowed)
        if not isinstance(value, str) or not (value or empty):
            raise self._wrong(name, value, allowed)
        try:
            value.encode()
        # JSON can spell half a character, which no tokenizer takes.
        except UnicodeEncodeError as error:
            raise self._wrong(name, value, f"{allowed}, of Unicode text") from error
        return value

    def integers(self, name: str, most: int) -> list[int]:
        """Return a list of whole numbers from 0 on."""
        allowed = f"a list, not empty, of integers from 0 to {most}"
        values = self._get(name, allowed)
        if not isinstance(values, list) or not values:
            raise self._wrong(name, values, allowed)
        for index, value in enumerate(values):
            if type(value) is not int or not 0 <= value <= most:
                raise self._wrong(f"{name}[{index}]", value, allowed)
        return values

    def mooncake(self) -> _Request:
        """Return the request of a line of Mooncake's format."""
        self.check_names(_MOONCAKE)
        ids = self.integers("hash_ids", MOST_TOKEN - _FIRST)
        most = len(ids) * HASHED_TOKENS
        length = self.integer("input_length", 1, MOST_TOKEN)
        if not most - HASHED_TOKENS < length <= most:
            raise self._error(
                f"input_length is {length} with {len(ids)} hash_ids",
                f"{most - HASHED_TOKENS + 1} to {most}, one id for each "
                f"{HASHED_TOKENS} tokens",
            )
        output = self.integer("output_length", 1, MOST_OUTPUT)
        at = self.seconds("timestamp", "milliseconds")
        return _Request(at, 1000, None, Turn(HashedPrompt(ids, length), output))

    def plain(self, encode: Encode) -> _Request:
        """Return the request of a line of the plain format."""
        self.check_names(_PLAIN)
        if "prompt" in self and "token_ids" in self:
            raise self._error("prompt and token_ids are both given", "one of them")
        if "token_ids" in self:
            tokens = self.integers("token_ids", MOST_TOKEN)
        else:
            tokens = encode(self.text("prompt"))
            if not tokens:
                what = "a text of at least one token"
                raise self._wrong("prompt", self._fields["prompt"], what)
        turn = Turn(tokens, self.integer("output_length", 1, MOST_OUTPUT))
        if "tenant" in self:
            turn.tenant = self.text("tenant", empty=True)
        if "priority" in self:
            turn.priority = self.integer("priority", -(1 << 63), (1 << 63) - 1)
        if "salt" in self:
            turn.salt = self.text("salt")
        session = self.text("session") if "session" in self else None
        at = self.seconds("arrival", "seconds") if "arrival" in self else 0.0
        return _Request(at, 1, session, turn)


def _read(path: Path, encode: Encode, limit: int | None) -> list[_Request]:
    """Return the requests of a file, in its order.

    Raises:
        TraceError: it cannot be read, or a line is wrong.
    """
    requests: list[_Request] = []
    mooncake: bool | None = None
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                line = _Line(f"{path}, line {number}", raw)
                if mooncake is None:
                    mooncake = line.is_mooncake()
                line.check_format(mooncake)
                requests.append(line.mooncake() if mooncake else line.plain(encode))
                if len(requests) == limit:
                    break
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read ({error.strerror or error}); allowed: a file of "
            "JSON lines"
        ) from error
    if not requests:
        raise TraceError(
            f"{path}: holds no request; allowed: JSON lines, a request in each"
        )
    return requests


def _chain(path: Path, requests: list[_Request]) -> list[Turn]:
    """Make each request the child of the one before it in its session.

    Returns:
        The first of each session, and all without one.

    Raises:
        TraceError: there is no session.
    """
    roots: list[Turn] = []
    last: dict[str, Turn] = {}
    for request in requests:
        turn, session = request.turn, request.session
        if session is None or session not in last:
            roots.append(turn)
        else:
            # The trace's prompt holds the answer that was given then.
            turn.whole = True
            last[session].children.append(turn)
        if session is not None:
            last[session] = turn
    if not last:
        raise TraceError(
            f"{path}: session is missing in every line read, and a closed loop needs "
            "it; allowed: a string, in lines with prompt or token_ids"
        )
    return roots


def load(
    path: Path,
    encode: Encode,
    *,
    closed_loop: bool = False,
    limit: int | None = None,
    rate: float = 1.0,
) -> list[Turn]:
    """Read a trace.

    The format is that of the first line. Mooncake's has ``timestamp`` (ms),
    ``input_length``, ``output_length`` and ``hash_ids``. The plain one has
    ``prompt`` or ``token_ids``, and ``output_length``; it may have ``arrival``
    (seconds), ``session``, ``tenant``, ``priority`` and ``salt``. Blank lines are
    skipped.

    In a closed loop a request of a session is sent at its time, but not before the
    one before it is answered. Its prompt is still the whole one of the trace: it
    goes on with the answer given then, not with the one of the replay. Without,
    sessions do not matter and everything is sent at its time.

    Args:
        path: of the file.
        encode: text to token ids, without special tokens.
        closed_loop: whether requests of a session wait for each other.
        limit: read the first ``limit`` requests of the file only.
        rate: send this many times as fast.

    Returns:
        Requests in order of arrival, those of the same time in that of the file; the
        first arrives at 0. In a closed loop, the first of each session, with the
        others as its descendants, and all requests without one.

    Raises:
        TraceError: the file or an argument is wrong; nothing is returned.
    """
    if not 0 < rate < math.inf:
        raise TraceError(f"rate is {rate}; allowed: a finite number above 0")
    if limit is not None and limit < 1:
        raise TraceError(f"limit is {limit}; allowed: an integer of at least 1")
    requests = _read(path, encode, limit)
    requests.sort(key=lambda request: request.at)
    start = requests[0].at
    for request in requests:
        request.turn.arrival = (request.at - start) / request.units / rate
    if math.isinf(requests[-1].turn.arrival):
        raise TraceError(
            f"rate is {rate}: the last request would never be sent; allowed: more"
        )
    if closed_loop:
        return _chain(path, requests)
    return [request.turn for request in requests]
