"""What a cache tells prompts apart by: their tokens, and salts as far as they count.

As ``vllm_radix.engine.request_keys`` does for requests: where prompts begin with
something public, all salts share it, and the first token after it is replaced by a
marker of that token and the salt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from vllm_radix.public_prefix import num_shared
from vllm_radix.tree import encode
from vllm_radix_bench.workloads.turn import Turn


class Prefixes(Protocol):
    """Tells how many tokens at the beginning of a prompt are public."""

    def length(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are public."""
        ...


class Home(NamedTuple):
    """Where a prompt is cached.

    Attributes:
        salt: whose it is from the beginning on; empty without one, and if all share
            it.
        start: its first private token, if all share what comes before; else 0.
        marker: in place of that token.
    """

    salt: str
    start: int = 0
    marker: int = 0

    @property
    def namespace(self) -> tuple[bool, str]:
        """What is the same for prompts that can share their first tokens."""
        return self.start > 0, self.salt

    def key(self, tokens: Sequence[int]) -> bytes:
        """Return the key of a prompt here, or of a prompt and what follows it."""
        if not self.start:
            return encode(tokens)
        tokens = list(tokens)
        tokens[self.start] = self.marker
        return encode(tokens)


class CacheKeys:
    """Tells prompts apart as a cache does.

    Args:
        public: what salts share; None for nothing.
        block_size: tokens in what is shared as a whole.
    """

    def __init__(self, public: Prefixes | None = None, block_size: int = 1) -> None:
        self._public = public
        self._block_size = block_size
        self._markers: dict[tuple[str, int], int] = {}

    def home(self, salt: str | None, prompt: Sequence[int]) -> Home:
        """Return where a prompt is cached."""
        salt, start = salt or "", 0
        if self._public is not None and prompt:
            length = self._public.length(prompt)
            start = num_shared(length, len(prompt), self._block_size)
        if not start:
            return Home(salt)
        content = salt, prompt[start]
        marker = self._markers.setdefault(content, -1 - len(self._markers))
        return Home("", start, marker)


class Shared(NamedTuple):
    """What salts share.

    Attributes:
        fewest: tokens that an infinite cache computes then.
        public_prefix: the option of radix that says so.
        keys: by which such a cache tells prompts apart.
    """

    fewest: int
    public_prefix: Any
    keys: CacheKeys


def keys_of(public_prefix: Any, block_size: int) -> CacheKeys:
    """Return what the cache of a replayed arm tells prompts apart by.

    Args:
        public_prefix: the option of radix, without texts.
        block_size: in which the arm counts prefixes.
    """
    if public_prefix == "":
        return CacheKeys()
    from vllm_radix.config import RadixConfig
    from vllm_radix.engine.public_prefixes import make_public_prefixes

    config = RadixConfig(public_prefix=public_prefix)
    return CacheKeys(make_public_prefixes(config, None), block_size)


def sharing_most(
    roots: Sequence[Turn], values: Sequence[Any], block_size: int
) -> Shared:
    """Return which of some values of ``public_prefix`` leaves the fewest tokens.

    Args:
        roots: the requests.
        values: of the option; equal ones are looked at once.
        block_size: in which arms count prefixes.
    """
    from vllm_radix_bench.replay.oracles import infinite_cache

    distinct = [one for at, one in enumerate(values) if one not in values[:at]]
    made = [(one, keys_of(one, block_size)) for one in distinct]
    found = [Shared(infinite_cache(roots, keys), one, keys) for one, keys in made]
    return min(found, key=lambda one: one.fewest)
