"""From text to tokens: a model's tokenizer, or none."""

import re
import zlib
from collections.abc import Callable
from pathlib import Path

Encode = Callable[[str], list[int]]
"""Returns the token ids of a text, without special tokens."""


class TokenizerError(ValueError):
    """A model folder has no tokenizer that can be loaded; the message names it."""


def words(text: str) -> list[int]:
    """Return a token for each word or mark of a text, without a tokenizer.

    For a replay only which tokens are equal matters, and about how many there are.
    """
    return [zlib.crc32(word.encode()) >> 2 for word in re.findall(r"\w+|[^\w\s]", text)]


def load_encode(model: Path) -> Encode:
    """Return the encoder of a model folder's tokenizer.

    Raises:
        TokenizerError: the folder has no tokenizer that can be loaded.
    """
    fast = model / "tokenizer.json"
    if fast.exists():
        from tokenizers import Tokenizer

        one = Tokenizer.from_file(str(fast))
        return lambda text: list(one.encode(text, add_special_tokens=False).ids)
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{model}: no tokenizer to load ({error})") from error
    return lambda text: list(other(text, add_special_tokens=False).input_ids)
