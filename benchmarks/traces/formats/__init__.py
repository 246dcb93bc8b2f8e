"""The trace formats.

A new one is a module here that makes a ``TraceFormat``, an entry of ``FORMATS``, and a
sample in the contract test (tests/bench/traces/test_formats.py).
"""

from vllm_radix_bench.traces.format import TraceFormat
from vllm_radix_bench.traces.formats.mooncake import MOONCAKE
from vllm_radix_bench.traces.formats.plain import PLAIN
from vllm_radix_bench.traces.line import Line

FORMATS: tuple[TraceFormat, ...] = (MOONCAKE, PLAIN)


def format_of(line: Line) -> TraceFormat:
    """Return the format of a line: the first that recognises it.

    Raises:
        TraceError: none does.
    """
    for one in FORMATS:
        if one.sniff(line):
            return one
    *others, last = (name for one in FORMATS for name in one.marks)
    raise line.error(
        f"{', '.join(others)} and {last} are missing",
        "the fields of " + " or ".join(one.describe() for one in FORMATS),
    )
