"""What a trace format is; `formats` has them all."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_radix_bench.traces.line import Line
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn


@dataclass
class TracedRequest:
    """A request as a trace has it.

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


@dataclass(frozen=True)
class TraceFormat:
    """A way to write a request on a line.

    Attributes:
        name: of the format, for messages and help.
        fields: all that a line may have.
        marks: fields of which each format has others: with one of them, a line is of
            this format.
        read: makes a request of a line; its errors name the line and the field.
    """

    name: str
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Line, Encode], TracedRequest]

    def sniff(self, line: Line) -> bool:
        """Return whether a line is of this format."""
        return any(name in line for name in self.marks)

    def describe(self) -> str:
        """Return the name and the fields, for messages and help."""
        either = f"; one of {' and '.join(self.marks)}" if len(self.marks) > 1 else ""
        return f"{self.name} ({', '.join(self.fields)}{either})"
