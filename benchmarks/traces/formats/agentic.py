"""LMCache's agentic traces: all messages so far, and the gap before each request.

``input`` goes through the chat template of ``--tokenizer``. A request is sent
``pre_gap`` seconds after the answer before it in its session; all sessions begin at
once.
"""

from vllm_radix_bench.traces import fields
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import Line
from vllm_radix_bench.workloads.turn import Turn


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    AGENTIC.check_names(line)
    tokens = fields.chat_tokens(line, "input", options)
    turn = Turn(tokens, fields.output_length(line, options))
    if "pre_gap" in line:
        turn.delay = line.seconds("pre_gap", "seconds")
    return TracedRequest(turn, session=line.text("session_id"))


AGENTIC = TraceFormat(
    name="agentic",
    about=__doc__,
    fields=("session_id", "input", "tools", "output_length", "pre_gap"),
    marks=("input",),
    read=_read,
    ignored=("model",),
)
