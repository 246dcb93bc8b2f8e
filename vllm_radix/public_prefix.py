"""The option ``public_prefix``, read and checked: what all cache salts share.

Declared prompts are the safe form: nothing is shared but what the operator has written
down. The other two forms share what clients write.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ALLOWED = (
    "the path of a JSON file of prompts, "
    '{"prompts": [...]}, {"first_tokens": N}, {"marker": ..., "within": N}, '
    "''"
)
_PROMPT = (
    "a text, a list of token ids, a list of chat messages, or "
    '{"messages": [...], "tools": [...]}'
)
_PROMPTS = f"a list of one prompt or more, each {_PROMPT}"

_MOST_SHOWN = 100
"""Characters of a wrong value that a message shows: prompts are long, and private."""


@dataclass(frozen=True)
class ChatPrompt:
    """The beginning of chats, as the model's chat template writes it.

    Attributes:
        messages: with which they begin; mostly one, of the role ``system``.
        tools: that they offer; None for none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Prompt = str | list[int] | ChatPrompt


@dataclass(frozen=True)
class DeclaredPrompts:
    """Prompts that begin with one of these share it.

    Attributes:
        prompts: texts, token ids, or beginnings of chats.
    """

    prompts: list[Prompt]


@dataclass(frozen=True)
class FirstTokens:
    """Prompts share their first tokens, whatever they are.

    Attributes:
        count: how many.
    """

    count: int


@dataclass(frozen=True)
class UpToMarker:
    """Prompts share what comes up to the end of a marker, whatever it is.

    Attributes:
        marker: a text, or token ids.
        within: the marker must end within so many tokens, else nothing is shared.
    """

    marker: str | list[int]
    within: int


PublicPrefix = DeclaredPrompts | FirstTokens | UpToMarker


def read_public_prefix(value: Any) -> PublicPrefix | None:
    """Return what the option says; None if nothing is shared.

    Args:
        value: of the option. A file is read, once until it is changed.

    Raises:
        ValueError: the value, or what is in the file, is wrong; the message is the end
            of a sentence that begins with the option.
    """
    if value == "":
        return None
    if isinstance(value, str):
        return DeclaredPrompts(_read_file(value))
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"prompts"}:
            return DeclaredPrompts(_prompts(value["prompts"], "'prompts'"))
        if keys == {"first_tokens"}:
            return FirstTokens(_count(value, "first_tokens"))
        if keys == {"marker", "within"}:
            marker = value["marker"]
            if not marker or not (isinstance(marker, str) or _are_tokens(marker)):
                raise ValueError(
                    f"'marker': {shown(marker)} is not a text or a list of token ids"
                )
            return UpToMarker(marker, _count(value, "within"))
    raise ValueError(f"{shown(value)} is not one of {ALLOWED}")


def shown(value: Any) -> str:
    """Return a value as a message shows it: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"


def has_texts(option: PublicPrefix | None) -> bool:
    """Whether a tokenizer is needed to tell what an option makes public."""
    if isinstance(option, DeclaredPrompts):
        return not all(isinstance(one, list) for one in option.prompts)
    return isinstance(option, UpToMarker) and isinstance(option.marker, str)


def num_shared(public: int, prompt: int, block_size: int) -> int:
    """Return how many tokens all salts share: whole blocks, and never a whole prompt.

    Args:
        public: tokens that are public.
        prompt: tokens of the prompt, at least 1.
        block_size: tokens in a block.
    """
    return min(public, prompt - 1) // block_size * block_size


def _count(value: Mapping[str, Any], name: str) -> int:
    count = value[name]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(
            f"{name!r}: {shown(count)} is not a whole number of at least 1"
        )
    return count


def _read_file(path: str) -> list[Prompt]:
    try:
        found = os.stat(path)
        text = _text_of(path, found.st_ino, found.st_mtime_ns, found.st_size)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{shown(path)} cannot be read: {why}; give one of {ALLOWED}"
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is not JSON: {error}; write {_PROMPTS}") from (
            error
        )
    return _prompts(value, shown(path))


@lru_cache(maxsize=4)
def _text_of(path: str, *version: int) -> str:
    """Return what is in a file; options are checked several times at a start."""
    return Path(path).read_text(encoding="utf-8")


def _are_tokens(value: Any) -> bool:
    """Return whether a value is a list of token ids, which are never negative."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(one) is int and 0 <= one < 1 << 31 for one in value)
    )


def _are_objects(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) for one in value)
    )


def _prompts(value: Any, where: str) -> list[Prompt]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {shown(value)} is not {_PROMPTS}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a pair of surrogates, which is no text; write {_PROMPTS}"
        ) from error
    return [_prompt(one, f"prompt {at + 1} of {where}") for at, one in enumerate(value)]


def _prompt(value: Any, which: str) -> Prompt:
    if (isinstance(value, str) and value) or _are_tokens(value):
        return value  # type: ignore[no-any-return]
    if _are_objects(value):
        value = {"messages": value}
    if isinstance(value, dict) and {"messages"} <= value.keys() <= {
        "messages",
        "tools",
    }:
        messages, tools = value["messages"], value.get("tools")
        roles = _are_objects(messages) and all("role" in one for one in messages)
        if roles and (tools is None or _are_objects(tools)):
            return ChatPrompt(messages, tools)
    raise ValueError(f"{which}: {shown(value)} is not {_PROMPT}")
