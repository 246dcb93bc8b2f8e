"""The plain format: prompts as text or tokens, arrivals, sessions, tenants."""

from vllm_radix_bench.traces.format import TracedRequest, TraceFormat
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, MAX_TOKEN, Line
from vllm_radix_bench.workloads.encoders import Encode
from vllm_radix_bench.workloads.turn import Turn


def _read(line: Line, encode: Encode) -> TracedRequest:
    line.check_names(PLAIN.fields)
    if "prompt" in line and "token_ids" in line:
        raise line.error("prompt and token_ids are both given", "one of them")
    if "token_ids" in line:
        tokens = line.integers("token_ids", MAX_TOKEN)
    else:
        tokens = encode(line.text("prompt"))
        if not tokens:
            raise line.wrong("prompt", "a text of at least one token")
    turn = Turn(tokens, line.integer("output_length", 1, MAX_OUTPUT_LENGTH))
    if "tenant" in line:
        turn.tenant = line.text("tenant", empty=True)
    if "priority" in line:
        turn.priority = line.integer("priority", -(1 << 63), (1 << 63) - 1)
    if "salt" in line:
        turn.salt = line.text("salt")
    session = line.text("session") if "session" in line else None
    at = line.seconds("arrival", "seconds") if "arrival" in line else 0.0
    return TracedRequest(at, 1, session, turn)


PLAIN = TraceFormat(
    name="plain",
    fields=(
        "prompt",
        "token_ids",
        "arrival",
        "output_length",
        "session",
        "tenant",
        "priority",
        "salt",
    ),
    marks=("prompt", "token_ids"),
    read=_read,
)
