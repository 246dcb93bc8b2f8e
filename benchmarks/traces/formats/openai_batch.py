"""OpenAI's batch files: a request body a line, all sent at once.

``body`` has ``messages``, which go through the chat template of ``--tokenizer``, or
``prompt``. What else it has does not matter here.
"""

from vllm_radix_bench.traces import fields
from vllm_radix_bench.traces.format import ReadOptions, TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import MAX_TOKEN, Line
from vllm_radix_bench.workloads.turn import Turn


def _tokens(body: Line, options: ReadOptions) -> list[int]:
    if body.one_of(("messages", "prompt")) != "prompt":
        return fields.chat_tokens(body, "messages", options)
    if isinstance(body.fields["prompt"], list):
        return body.integers("prompt", MAX_TOKEN)
    return fields.prompt_tokens(body, options)


def _read(line: Line, options: ReadOptions) -> TracedRequest:
    OPENAI_BATCH.check_names(line)
    body = line.object("body")
    turn = Turn(_tokens(body, options), fields.output_length(body, options))
    if "cache_salt" in body:
        turn.salt = body.text("cache_salt")
    if "priority" in body:
        turn.priority = body.integer("priority", -(1 << 63), (1 << 63) - 1)
    return TracedRequest(turn, 0.0)


OPENAI_BATCH = TraceFormat(
    name="openai-batch",
    about=__doc__,
    fields=("body",),
    marks=("body",),
    read=_read,
    ignored=("custom_id", "method", "url"),
)
