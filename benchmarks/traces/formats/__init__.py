"""The trace formats.

A new one is a module here that makes a ``TraceFormat``, an entry of ``FORMATS``, and a
sample in the contract test (tests/bench/traces/test_formats.py).
"""

from vllm_radix_bench.traces.format import TraceFormat
from vllm_radix_bench.traces.formats.agentic import AGENTIC
from vllm_radix_bench.traces.formats.bailian import BAILIAN
from vllm_radix_bench.traces.formats.chat import CHAT
from vllm_radix_bench.traces.formats.mooncake import MOONCAKE
from vllm_radix_bench.traces.formats.openai_batch import OPENAI_BATCH
from vllm_radix_bench.traces.formats.plain import PLAIN
from vllm_radix_bench.traces.formats.recorded import RECORDED
from vllm_radix_bench.traces.line import Line

FORMATS: tuple[TraceFormat, ...] = (
    RECORDED,
    # Before Mooncake's, for both have hash_ids.
    BAILIAN,
    MOONCAKE,
    PLAIN,
    CHAT,
    OPENAI_BATCH,
    AGENTIC,
)


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
        "a format known by its fields: " + ", ".join(one.describe() for one in FORMATS),
    )


def markdown_table() -> str:
    """Return a table of the formats, for the documentation."""
    rows = ["| format | fields |", "|---|---|"]
    for one in FORMATS:
        about = " ".join(one.about.split())
        names = ", ".join(f"`{name}`" for name in one.fields)
        rows.append(f"| {one.name} | {about.replace('``', '`')} Fields: {names} |")
    return "\n".join(rows) + "\n"
