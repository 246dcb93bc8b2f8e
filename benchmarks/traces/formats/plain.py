"""Ours, and vLLM's custom datasets: prompts as text or tokens.

``arrival`` is in seconds; a line without it comes at the time of the line before it.
"""

from vllm_radix_bench.traces import fields
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import Line
from vllm_radix_bench.workloads.turn import Turn


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    PLAIN.check_names(line)
    tokens = fields.prompt_tokens(line, options)
    turn = Turn(tokens, fields.output_length(line, options))
    fields.set_request_fields(line, turn)
    timed = "arrival" in line
    at = line.seconds("arrival", "seconds") if timed else 0.0
    return TracedRequest(turn, at, timed=timed, session=fields.session(line))


PLAIN = TraceFormat(
    name="plain",
    about=__doc__,
    fields=(
        *fields.PROMPT,
        "arrival",
        *fields.OUTPUT_LENGTH,
        *fields.SESSION,
        *fields.OF_A_REQUEST,
    ),
    marks=fields.PROMPT,
    read=_read,
)
