"""From text to tokens: a model's tokenizer, or none."""

import re
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

Encode = Callable[[str], list[int]]
"""Returns the token ids of a text, without special tokens."""

EncodeChat = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], list[int]]
"""Returns the token ids of the prompt that messages and tools make."""


_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff\u1950-\u19df"  # Burmese, Khmer, Tai
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Scripts that put no spaces between words, as ranges of a regular expression."""

_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


class TokenizerError(ValueError):
    """A model folder has no tokenizer that can be loaded; the message names it."""


def words(text: str) -> list[int]:
    """Return a token for each word or mark of a text, without a tokenizer.

    For a replay only which tokens are equal matters, and about how many there are. In
    scripts without spaces between words, a token is a character.
    """
    return [zlib.crc32(word.encode()) >> 2 for word in _WORDS.findall(text)]


def load_encode(model: Path) -> Encode:
    """Return the encoder of a model folder's tokenizer.

    Raises:
        TokenizerError: the folder has no tokenizer that can be loaded.
    """
    fast = model / "tokenizer.json"
    if fast.exists():
        from tokenizers import Tokenizer

        try:
            one = Tokenizer.from_file(str(fast))
        except Exception as error:  # it has no class of its own
            raise _no_tokenizer(model, error) from error
        return lambda text: list(one.encode(text, add_special_tokens=False).ids)
    other = _tokenizer(model)
    return lambda text: list(other(text, add_special_tokens=False).input_ids)


class ChatTemplate:
    """The chat template of a model folder's tokenizer, an ``EncodeChat``.

    It is loaded on first use.

    Args:
        model: the folder.
    """

    def __init__(self, model: Path) -> None:
        self._model = model

    @cached_property
    def _parts(self) -> tuple[Any, Encode]:
        # transformers needs it for templates, and says so in a way of its own.
        import jinja2  # noqa: F401

        return _tokenizer(self._model), load_encode(self._model)

    def __call__(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            Exception: what the template raises, where it takes no such messages.
            TokenizerError: the folder has no tokenizer that can be loaded.
        """
        tokenizer, encode = self._parts
        text = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        return encode(text)


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except ImportError:
        raise
    except Exception as error:  # that of a broken file has no class of its own
        raise _no_tokenizer(model, error) from error


def _no_tokenizer(model: Path, error: Exception) -> TokenizerError:
    if not model.exists():
        return TokenizerError(f"{model}: no such folder, and not found on the hub")
    if not model.is_dir():
        return TokenizerError(f"{model}: is a file, not a model folder")
    reason = " ".join(str(error).split())
    return TokenizerError(f"{model}: no tokenizer to load ({reason})")
