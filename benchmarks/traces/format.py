"""What a trace format is; ``formats`` has them all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_radix_bench.traces.line import Line
from vllm_radix_bench.workloads.encoders import Encode, EncodeChat
from vllm_radix_bench.workloads.turn import Turn

DEFAULT_OUTPUT_LENGTH = 256
"""Tokens generated where a line names none, as in ``vllm bench serve``."""


@dataclass(frozen=True)
class ReadOptions:
    """What lines are read with.

    Attributes:
        encode: text to token ids, without special tokens.
        encode_chat: messages to the token ids of a prompt; None without a tokenizer.
        output_length: of requests whose line names none.
        earlier: what lines leave to later ones of the same file, by request.
    """

    encode: Encode
    encode_chat: EncodeChat | None = None
    output_length: int = DEFAULT_OUTPUT_LENGTH
    earlier: dict[int, Any] = field(default_factory=dict)


@dataclass
class TracedRequest:
    """A request as a trace has it.

    Attributes:
        turn: the request; its arrival is not set.
        at: when it came, in units of the trace; None where a trace tells only that it
            came after the one before it in its session.
        units: of the trace in a second.
        timed: whether ``at`` is of its line; else it is to become that of the line
            before it in the file.
        session: that it is part of, after those of the lines before.
        id: by which others name it.
        follows: ``id`` of the request whose answer it goes on from, if it is known.
        may_add: whether its tokens may be what it adds to its session, not all.
        place: among requests of the same time; those of the same place come in the
            order of the file.
    """

    turn: Turn
    at: float | None = None
    units: int = 1
    timed: bool = True
    session: str | None = None
    id: str | None = None
    follows: str | None = None
    may_add: bool = False
    place: int = 0


@dataclass(frozen=True)
class TraceFormat:
    """A way to write a request on a line.

    Attributes:
        name: of the format, for messages and help.
        about: what it is: the docstring of its module.
        fields: all that are read.
        marks: fields of which each format has others: with one of them, a line is of
            this format, unless it is of one that stands before it in ``FORMATS``.
        read: makes a request of a line, or None of one that holds none; its errors
            name the line and the field.
        id_field: by which lines name each other; no two may have the same.
        ignored: fields that a line may have, and that do not matter here.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Line, ReadOptions], TracedRequest | None]
    ignored: tuple[str, ...] = ()
    id_field: str = ""

    def sniff(self, line: Line) -> bool:
        """Return whether a line has a mark of this format."""
        return any(name in line for name in self.marks)

    def check_names(self, line: Line) -> None:
        """Check that a line has no other fields.

        Raises:
            TraceError: it has.
        """
        line.check_names((*self.fields, *self.ignored))

    def describe(self) -> str:
        """Return the name, and by what it is known, for messages and help."""
        return f"{self.name} ({' or '.join(self.marks)})"
