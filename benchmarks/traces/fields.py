"""Fields that several formats have, under the names that users give them."""

from collections.abc import Mapping
from typing import Any

from vllm_radix.engine.hints import READERS, HintError, parse_hints
from vllm_radix_bench.traces.format import ReadOptions
from vllm_radix_bench.traces.line import MAX_OUTPUT_LENGTH, MAX_TOKEN, Line
from vllm_radix_bench.workloads.turn import Turn

OUTPUT_LENGTH = (
    "output_length",
    "output_tokens",
    "max_tokens",
    "max_completion_tokens",
)
SESSION = ("session", "session_id")
OF_A_REQUEST = ("tenant", "priority", "salt", "hints")
PROMPT = ("prompt", "token_ids")


def output_length(line: Line, options: ReadOptions) -> int:
    """Return how many tokens are generated.

    Raises:
        TraceError: it is wrong, or named twice.
    """
    name = line.one_of(OUTPUT_LENGTH)
    if name is None:
        return options.output_length
    return line.integer(name, 1, MAX_OUTPUT_LENGTH)


def session(line: Line) -> str | None:
    """Return the session, if there is one.

    Raises:
        TraceError: it is wrong, or named twice.
    """
    name = line.one_of(SESSION)
    return None if name is None else line.text(name)


def set_request_fields(line: Line, turn: Turn) -> None:
    """Set tenant, priority, salt and hints, where they are given.

    Raises:
        TraceError: one is wrong.
    """
    if "tenant" in line:
        turn.tenant = line.text("tenant", empty=True)
    if "priority" in line:
        turn.priority = line.integer("priority", -(1 << 63), (1 << 63) - 1)
    if "salt" in line:
        turn.salt = line.text("salt")
    if "hints" in line:
        turn.hints = _hints(line)


def _hints(line: Line) -> Mapping[str, Any]:
    """Return the hints of a client.

    Raises:
        TraceError: they are none.
    """
    said = line.object("hints")
    said.check_names(tuple(READERS))
    try:
        parse_hints(said.fields)
    except HintError as error:
        allowed = "an object of the fields of vllm_xargs that are hints"
        raise line.error(f"hints: {error}", allowed) from error
    return said.fields


def prompt_tokens(line: Line, options: ReadOptions) -> list[int]:
    """Return the tokens of ``prompt``, a text, or of ``token_ids``.

    Raises:
        TraceError: it is wrong, missing, or both are given.
    """
    if line.one_of(PROMPT) == "token_ids":
        return line.integers("token_ids", MAX_TOKEN)
    tokens = options.encode(line.text("prompt"))
    if not tokens:
        raise line.wrong("prompt", "a text of at least one token")
    return tokens


def chat_tokens(line: Line, name: str, options: ReadOptions) -> list[int]:
    """Return the prompt that a model's chat template makes of messages and ``tools``.

    Raises:
        TraceError: they are wrong, or there is no tokenizer.
    """
    messages = [_message(one) for one in line.objects(name)]
    tools = None
    if line.fields.get("tools", []) != []:
        tools = [dict(one.fields) for one in line.objects("tools")]
    if options.encode_chat is None:
        raise line.error(
            f"{line.full(name)} needs a chat template to be a prompt",
            "with --tokenizer FOLDER, a model folder that has one",
        )
    try:
        tokens = options.encode_chat(messages, tools)
    except ImportError:
        raise
    # Templates are programs of the models' authors: what they raise is theirs.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise line.error(
            f"{line.full(name)} cannot be made a prompt ({reason})",
            "messages that the chat template of --tokenizer takes",
        ) from error
    if not tokens:
        raise line.wrong(name, "messages of at least one token")
    return tokens


def _message(line: Line) -> dict[str, Any]:
    """Return a message whose content is one text, as chat templates take it.

    Raises:
        TraceError: it has no role, or a content that is no text.
    """
    message = {**line.fields, "role": line.text("role")}
    if isinstance(message.get("content"), list):
        # vLLM joins them so for templates that take a text.
        parts = line.objects("content") if message["content"] else []
        message["content"] = "\n".join(one.text("text", empty=True) for one in parts)
    elif "content" in line:
        message["content"] = line.text("content", empty=True)
    else:
        message["content"] = ""
    return message
