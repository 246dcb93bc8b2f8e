"""What a request's blocks are keyed by: its tokens, and whatever else counts.

Two requests may share a block only if the model would compute the same KV for
it. Beyond the tokens that depends on the LoRA adapter and the cache salt, which
pick the namespace, and on media and prompt embeddings, whose tokens are
placeholders: those blocks get a marker in place of their first token.
"""

from collections import OrderedDict
from collections.abc import Hashable

from vllm_radix.engine.compat import Request, generate_block_hash_extra_keys
from vllm_radix.tree import BYTES_PER_TOKEN, Namespace, encode

_IN_NAMESPACE = ("lora", "cache_salt")
_MAX_MARKERS = 65_536

_KEY = "radix_key"
"""The attribute in which a request carries its key, to go when it goes."""


class Markers:
    """Gives equal contents equal negative numbers, exactly, not by hash.

    Numbers are never given twice, so forgetting the oldest contents costs a
    hit at worst, never a wrong one.

    Args:
        capacity: contents remembered.
    """

    def __init__(self, capacity: int = _MAX_MARKERS) -> None:
        self._capacity = capacity
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._next = -1

    def number(self, content: Hashable) -> int:
        """Return the number of ``content``: below 0, fits 32 bits. O(1).

        Raises:
            OverflowError: two billion contents have been seen.
        """
        known = self._numbers.get(content)
        if known is not None:
            self._numbers.move_to_end(content)
            return known
        if self._next < -(2**31):
            raise OverflowError("out of markers for media: restart the engine")
        self._numbers[content] = self._next
        self._next -= 1
        if len(self._numbers) > self._capacity:
            self._numbers.popitem(last=False)
        return self._next + 1


class RequestKeys:
    """Keys of requests, encoded once and extended as requests grow.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.markers = Markers()

    def namespace(self, request: Request) -> Namespace:
        """Return the namespace of a request's blocks: LoRA adapter and salt."""
        lora, salt = request.lora_request, request.cache_salt
        if lora is None:
            return salt and ("salt", salt)
        return "lora", lora.lora_name, lora.lora_path, salt or None

    @staticmethod
    def is_plain(request: Request) -> bool:
        """Whether a request's tokens say it all, and never change again."""
        return not (
            request.mm_features
            or request.prompt_embeds is not None
            or request.resumable
        )

    def key(self, request: Request, num_tokens: int) -> bytes:
        """Return a key of at least ``num_tokens`` tokens; O(new tokens + copy).

        Tokens after the last whole block are there for plain requests only.

        Raises:
            ValueError: the request has fewer tokens.
        """
        size = self.block_size
        # A streaming session replaces tokens it had: nothing of it is kept.
        known: bytes = request.__dict__.get(_KEY, b"")
        have = len(known) // BYTES_PER_TOKEN
        if have >= num_tokens:
            return known
        total = request.num_tokens
        if total < num_tokens:
            raise ValueError(
                f"request {request.request_id} has {total} tokens, not {num_tokens}"
            )
        # Whole blocks only, so that markers never change afterwards.
        whole = total // size * size
        if have < whole:
            tokens = request.all_token_ids[have:whole]
            if request.mm_features or request.prompt_embeds is not None:
                tokens = list(tokens)
                self._mark(request, tokens, have // size)
            known += encode(tokens)
            if not request.resumable:
                request.__dict__[_KEY] = known
        if whole < num_tokens and self.is_plain(request):
            known += encode(request.all_token_ids[whole:num_tokens])
        return known

    def _mark(self, request: Request, tokens: list[int], first: int) -> None:
        """Put markers into blocks that hold media or embeddings, in place."""
        size = self.block_size
        for at in range(0, len(tokens), size):
            start = first * size + at
            extra, _ = generate_block_hash_extra_keys(request, start, start + size, 0)
            content = tuple(e for e in extra or () if e[0] not in _IN_NAMESPACE)
            if content:
                tokens[at] = self.markers.number((content, tokens[at]))
