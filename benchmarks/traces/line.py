"""One line of a trace, and what may be asked of it."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TOKEN = (1 << 30) - 1
"""The largest token of a prompt; a replay makes up answers from larger ones."""

MAX_OUTPUT_LENGTH = 1_000_000
"""The largest ``output_length``: beyond any model, and answers are kept in memory."""

MAX_SECONDS = 1e12
"""The largest time: a clock that counts further loses milliseconds."""


class TraceError(ValueError):
    """A trace cannot be used; the message says where, what, and what is allowed."""


class Line:
    """The fields of one line, or of an object in it.

    Every method but ``in`` raises ``TraceError``.

    Args:
        where: file and line, for messages.
        fields: by name.
        prefix: of the names in messages, where the fields are those of an object.
    """

    def __init__(self, where: str, fields: Mapping[str, Any], prefix: str = "") -> None:
        self._where = where
        self._prefix = prefix
        self.fields = fields

    @classmethod
    def parse(cls, where: str, raw: bytes) -> "Line":
        """Return the fields of a JSON object.

        Args:
            where: file and line, for messages.
            raw: the line.
        """
        line = cls(where, {})
        try:
            fields = json.loads(raw.decode())
        # Of these, UnicodeDecodeError and JSONDecodeError are ValueErrors; so is
        # what an integer of thousands of digits raises.
        except (ValueError, RecursionError) as error:
            raise line.error(f"is not JSON ({error})", "one JSON object a line") from (
                error
            )
        if not isinstance(fields, dict):
            raise line.error(f"is {reprlib.repr(fields)}", "one JSON object a line")
        return cls(where, fields)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def full(self, name: str) -> str:
        """Return the name of a field with those of the objects that it is in."""
        return self._prefix + name

    def error(self, what: str, allowed: str) -> TraceError:
        """Return an error that names the line."""
        return TraceError(f"{self._where}: {what}; allowed: {allowed}")

    def wrong(self, name: str, allowed: str) -> TraceError:
        """Return an error that names the line, a field and its value."""
        return self._wrong(name, self.fields[name], allowed)

    def missing(self, name: str, allowed: str) -> TraceError:
        """Return an error that names the line and a field that is not there."""
        return self.error(f"{self.full(name)} is missing", allowed)

    def check_names(self, allowed: Sequence[str]) -> None:
        """Check that no field is unknown."""
        unknown = [reprlib.repr(name) for name in self.fields if name not in allowed]
        if unknown:
            some = ", ".join(unknown[:8])
            raise self.error(f"unknown field {some}", ", ".join(allowed))

    def one_of(self, names: Sequence[str]) -> str | None:
        """Return which of some fields is there, or None; two are too many."""
        given = [name for name in names if name in self]
        if len(given) > 1:
            both = f"{self.full(given[0])} and {self.full(given[1])} are both given"
            raise self.error(both, "one of them")
        return given[0] if given else None

    def _get(self, name: str, allowed: str) -> Any:
        if name not in self:
            raise self.missing(name, allowed)
        return self.fields[name]

    def _wrong(self, name: str, value: object, allowed: str) -> TraceError:
        return self.error(f"{self.full(name)} is {reprlib.repr(value)}", allowed)

    def integer(self, name: str, least: int, most: int) -> int:
        """Return a whole number; a bool is none."""
        allowed = f"an integer from {least} to {most}"
        value = self._get(name, allowed)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, allowed)
        return value

    def seconds(self, name: str, unit: str) -> float:
        """Return a time, as it stands.

        Args:
            name: of the field.
            unit: of the time: seconds or milliseconds.
        """
        most = MAX_SECONDS * (1000 if unit == "milliseconds" else 1)
        allowed = f"a finite number of {unit}, 0 or more, up to {most:g}"
        value = self._get(name, allowed)
        try:
            good = type(value) in (int, float) and 0 <= float(value) <= most
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

    def object(self, name: str) -> "Line":
        """Return the fields of an object, but those that are null."""
        value = self._get(name, "an object")
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Line(self._where, value, f"{self.full(name)}.").without_nulls()

    def objects(self, name: str) -> list["Line"]:
        """Return the fields of each object of a list, but those that are null."""
        allowed = "a list, not empty, of objects"
        values = self._get(name, allowed)
        if not isinstance(values, list) or not values:
            raise self._wrong(name, values, allowed)
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise self._wrong(f"{name}[{index}]", value, "an object")
        return [
            Line(self._where, value, f"{self.full(name)}[{i}].").without_nulls()
            for i, value in enumerate(values)
        ]

    def without_nulls(self) -> "Line":
        """Return the line without fields that are null, which request bodies have."""
        given = {name: one for name, one in self.fields.items() if one is not None}
        return Line(self._where, given, self._prefix)
