"""How many tokens of a prompt are public: every cache salt shares them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_radix.config import RadixConfig
from vllm_radix.engine.compat import ModelConfig, cached_tokenizer_from_config
from vllm_radix.public_prefix import (
    ChatPrompt,
    DeclaredPrompts,
    FirstTokens,
    Prompt,
    shown,
)

_GOES_ON = ("A", "z", "7", " b", "\n", "\n\n", ".", "é", "你", "<")
"""What may follow a declared text: its last tokens count if they stay the same."""


class PublicPrefixes(ABC):
    """Tells how many tokens at the beginning of a prompt are public."""

    @abstractmethod
    def length(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are public."""

    @abstractmethod
    def __str__(self) -> str: ...


class Declared(PublicPrefixes):
    """Prompts that begin with a declared sequence share it; the longest one counts.

    Args:
        sequences: token ids of each.

    Attributes:
        sequences: as given, the longest first.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self.sequences = sorted({tuple(s) for s in sequences}, key=len, reverse=True)

    def length(self, prompt: Sequence[int]) -> int:
        """Return the length of the longest sequence a prompt begins with: O(those)."""
        for sequence in self.sequences:
            count = len(sequence)
            # The last token tells most of them apart.
            last = prompt[count - 1 : count]
            if [*last] == [sequence[-1]] and tuple(prompt[:count]) == sequence:
                return count
        return 0

    def __str__(self) -> str:
        lengths = ", ".join(str(len(sequence)) for sequence in self.sequences)
        return f"what begins with a declared prompt, of {lengths} tokens"


class First(PublicPrefixes):
    """All prompts that have so many tokens share them.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def length(self, prompt: Sequence[int]) -> int:
        """Return the count, or 0 of a shorter prompt: O(1).

        What follows a shorter one is an answer, which is never public.
        """
        return self._count if len(prompt) >= self._count else 0

    def __str__(self) -> str:
        return f"the first {self._count} tokens, which tells what others ask"


class UpTo(PublicPrefixes):
    """Prompts share what comes up to the first place where a marker ends.

    Args:
        marker: token ids.
        within: it must end within so many tokens.
    """

    def __init__(self, marker: Sequence[int], within: int) -> None:
        self._marker = list(marker)
        self._within = within

    def length(self, prompt: Sequence[int]) -> int:
        """Return where the marker first ends in a prompt; 0 if nowhere.

        O(within x tokens of the marker).
        """
        marker, head = self._marker, list(prompt[: self._within])
        first, at = marker[0], 0
        try:
            while True:
                at = head.index(first, at)
                if head[at : at + len(marker)] == marker:
                    return at + len(marker)
                at += 1
        except ValueError:
            return 0

    def __str__(self) -> str:
        return (
            f"what comes up to tokens {self._marker} within {self._within}, which "
            "tells what others have there"
        )


def make_public_prefixes(
    config: RadixConfig, model_config: ModelConfig | None
) -> PublicPrefixes | None:
    """Return what the option ``public_prefix`` says; None if it is not set.

    Args:
        config: the options.
        model_config: vLLM's: its tokenizer reads texts; None where there are none.

    Raises:
        ValueError: a text has no tokens that it keeps whatever follows, or there is no
            tokenizer, or no chat template for it.
    """
    option = config.public
    if option is None:
        return None
    if isinstance(option, FirstTokens):
        return First(option.count)
    tokenizer = _Tokenizer(model_config)
    if isinstance(option, DeclaredPrompts):
        return Declared(tokenizer.beginning(prompt) for prompt in option.prompts)
    marker = option.marker
    if isinstance(marker, str):
        marker = tokenizer.encode(marker, add_special_tokens=False)
    if not 0 < len(marker) <= option.within:
        raise ValueError(
            f"radix option 'public_prefix': 'marker' {shown(option.marker)} has "
            f"{len(marker)} tokens; allowed: 1 to 'within', which is {option.within}"
        )
    return UpTo(marker, option.within)


class _Tokenizer:
    """The model's tokenizer, loaded when the first text is to be read."""

    def __init__(self, model_config: ModelConfig | None) -> None:
        self._model_config = model_config
        self._loaded: Any = None

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = cached_tokenizer_from_config(self._model_config)
            if self._loaded is None:
                raise ValueError(
                    "radix option 'public_prefix': texts are read with the model's "
                    "tokenizer, and --skip-tokenizer-init is given: write token ids, "
                    "or drop it"
                )
        return self._loaded

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer.encode(text, **options))

    def beginning(self, prompt: Prompt) -> list[int]:
        """Return the tokens with which all begin that go on from a prompt.

        Raises:
            ValueError: there are none, or the chat template refuses it.
        """
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, ChatPrompt):
            rendered = [self._chat(prompt, end) for end in _GOES_ON]
        else:
            rendered = [self.encode(prompt + end) for end in _GOES_ON]
        common = rendered[0]
        for other in rendered[1:]:
            pairs = enumerate(zip(common, other, strict=False))
            end = next((at for at, (a, b) in pairs if a != b), len(other))
            common = common[:end]
        if not common:
            raise ValueError(
                f"radix option 'public_prefix': no tokens begin all that goes on from "
                f"{shown(prompt)}: write token ids"
            )
        return common

    def _chat(self, prompt: ChatPrompt, says: str) -> list[int]:
        """Return the tokens of a chat that goes on from a prompt."""
        messages = [*prompt.messages, {"role": "user", "content": says}]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=prompt.tools,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever a template raises
            raise ValueError(
                "radix option 'public_prefix': the model's chat template does not take "
                f"{shown(prompt.messages)} before a message of a user ({error}): write "
                "the token ids instead"
            ) from error
        # The template has written the special tokens itself, as in vLLM's server.
        return self.encode(text, add_special_tokens=False)
