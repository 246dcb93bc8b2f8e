"""Messages, as chat requests have them, through the chat template of ``--tokenizer``.

``messages`` are all that were said. ``arrival`` is in seconds; ``timestamp``, and
``delay`` after the answer before it in its session, are in milliseconds, as AIPerf has
them. A line without any of them comes at the time of the line before it.
"""

from vllm_radix_bench.traces import fields
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import Line
from vllm_radix_bench.workloads.turn import Turn

_TIMES = {"arrival": ("seconds", 1), "timestamp": ("milliseconds", 1000)}


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    CHAT.check_names(line)
    line = line.without_nulls()
    tokens = fields.chat_tokens(line, "messages", options)
    turn = Turn(tokens, fields.output_length(line, options))
    fields.set_request_fields(line, turn)
    session = fields.session(line)
    name = line.one_of(tuple(_TIMES))
    at, units = 0.0, 1
    if name is not None:
        unit, units = _TIMES[name]
        at = line.seconds(name, unit)
    if "delay" not in line:
        timed = name is not None
        return TracedRequest(turn, at, units, timed, session)
    turn.delay = line.seconds("delay", "milliseconds") / 1000
    if session is None:
        raise line.missing(fields.SESSION[1], "a string, in lines with delay")
    return TracedRequest(turn, None if name is None else at, units, session=session)


CHAT = TraceFormat(
    name="chat",
    about=__doc__,
    fields=(
        "messages",
        "tools",
        *_TIMES,
        "delay",
        *fields.OUTPUT_LENGTH,
        *fields.SESSION,
        *fields.OF_A_REQUEST,
    ),
    marks=("messages",),
    read=_read,
    ignored=(
        "id",
        "model",
        "frequency_penalty",
        "ignore_eos",
        "logprobs",
        "metadata",
        "min_p",
        "n",
        "presence_penalty",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
    ),
)
