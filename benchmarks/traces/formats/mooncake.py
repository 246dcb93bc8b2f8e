"""Mooncake's: lengths, and an id for each 512 tokens of a prompt; times in ms.

AIPerf's has sessions, too. A line whose ids begin with the first id of its session is a
whole prompt; another one is what it adds to its session, as AIPerf writes them.
``delay``: milliseconds after the answer before it, if there is no ``timestamp``.
"""

from vllm_radix_bench.traces.fields import SESSION, session
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.hashed_prompt import hashed_prompt
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, Line
from vllm_radix_bench.workloads.turn import Turn

HASHED_TOKENS = 512
"""Tokens of a prompt that an id stands for."""


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    MOONCAKE.check_names(line)
    prompt = hashed_prompt(line, HASHED_TOKENS)
    turn = Turn(prompt, line.integer("output_length", 1, MAX_OUTPUT_LENGTH))
    of = session(line)
    if "delay" in line:
        turn.delay = line.seconds("delay", "milliseconds") / 1000
        if of is None:
            raise line.missing(SESSION[1], "a string, in lines with delay")
    at = None
    if "timestamp" in line or of is None:
        at = line.seconds("timestamp", "milliseconds")
    return TracedRequest(turn, at, 1000, session=of, may_add=of is not None)


MOONCAKE = TraceFormat(
    name="mooncake",
    about=__doc__,
    fields=(
        "timestamp",
        "input_length",
        "output_length",
        "hash_ids",
        *SESSION,
        "delay",
    ),
    marks=("hash_ids",),
    read=_read,
    ignored=("group_id", "is_restart", "headers", "extra"),
)
