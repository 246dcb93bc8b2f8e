"""One line of a trace, and what may be asked of it."""

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

MAX_TOKEN = (1 << 30) - 1
"""The largest token of a prompt; a replay makes up answers from larger ones."""

MAX_OUTPUT_LENGTH = 1_000_000
"""The largest ``output_length``: beyond any model, and answers are kept in memory."""


class TraceError(ValueError):
    """A trace cannot be used; the message says where, what, and what is allowed."""


class Line:
    """The fields of one line. Every method but ``in`` raises ``TraceError``.

    Args:
        where: file and line, for messages.
        raw: the line, a JSON object.
    """

    def __init__(self, where: str, raw: bytes) -> None:
        self._where = where
        try:
            fields = json.loads(raw.decode())
        # Of these, UnicodeDecodeError and JSONDecodeError are ValueErrors; so is
        # what an integer of thousands of digits raises.
        except (ValueError, RecursionError) as error:
            raise self.error(f"is not JSON ({error})", "an object") from error
        if not isinstance(fields, dict):
            raise self.error(f"is {reprlib.repr(fields)}", "an object")
        self._fields: dict[str, Any] = fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def error(self, what: str, allowed: str) -> TraceError:
        """Return an error that names the line."""
        return TraceError(f"{self._where}: {what}; allowed: {allowed}")

    def wrong(self, name: str, allowed: str) -> TraceError:
        """Return an error that names the line, a field and its value."""
        return self._wrong(name, self._fields[name], allowed)

    def check_names(self, allowed: Sequence[str]) -> None:
        """Check that no field is unknown."""
        unknown = [reprlib.repr(name) for name in self._fields if name not in allowed]
        if unknown:
            some = ", ".join(unknown[:8])
            raise self.error(f"unknown field {some}", ", ".join(allowed))

    def _get(self, name: str, allowed: str) -> Any:
        if name not in self:
            raise self.error(f"{name} is missing", allowed)
        return self._fields[name]

    def _wrong(self, name: str, value: object, allowed: str) -> TraceError:
        return self.error(f"{name} is {reprlib.repr(value)}", allowed)

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
