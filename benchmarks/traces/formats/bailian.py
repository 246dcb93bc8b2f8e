"""Qwen-Bailian's: lengths, and an id for each 16 tokens of a prompt; times in seconds.

In a closed loop a line goes on from that of ``parent_chat_id``; -1, or a parent that is
not in the file or comes later, begins a session. Its prompt is the whole one.
"""

from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.hashed_prompt import hashed_prompt
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, Line
from vllm_radix_bench.workloads.turn import Turn

HASHED_TOKENS = 16
"""Tokens of a prompt that an id stands for."""

_MOST = (1 << 63) - 1


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    BAILIAN.check_names(line)
    prompt = hashed_prompt(line, HASHED_TOKENS)
    turn = Turn(prompt, line.integer("output_length", 1, MAX_OUTPUT_LENGTH))
    at = line.seconds("timestamp", "seconds")
    parent = -1
    if "parent_chat_id" in line:
        parent = line.integer("parent_chat_id", -1, _MOST)
    return TracedRequest(
        turn,
        at,
        id=str(line.integer("chat_id", 0, _MOST)),
        follows=None if parent == -1 else str(parent),
    )


BAILIAN = TraceFormat(
    name="bailian",
    about=__doc__,
    fields=(
        "chat_id",
        "parent_chat_id",
        "timestamp",
        "input_length",
        "output_length",
        "hash_ids",
    ),
    marks=("chat_id",),
    read=_read,
    ignored=("type", "turn"),
    id_field="chat_id",
)
