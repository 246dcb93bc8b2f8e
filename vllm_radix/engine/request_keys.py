"""What a request's blocks are keyed by: its tokens, and whatever else counts.

Two requests may share a block only if the model would compute the same KV for
it. Beyond the tokens that depends on the LoRA adapter and the cache salt, which
pick the namespace, and on media and prompt embeddings, whose tokens are
placeholders: those blocks get a marker in place of their first token.

Where prompts begin with something public, all salts share one namespace, and the
first token after it is replaced by a marker of that token and the salt. Paths of
different salts part there::

    key of salt a    [public public][a:x ...][...]
    key of salt b    [public public][b:x ...][...]
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import NamedTuple, Protocol, cast

from vllm_radix.engine.compat import Request, generate_block_hash_extra_keys
from vllm_radix.public_prefix import num_shared
from vllm_radix.tree import BYTES_PER_TOKEN, Namespace, encode

_IN_NAMESPACE = ("lora", "cache_salt")
_MIN_MARKERS = 65_536
_MARKERS_PER_BLOCK = 2
_LOW = 1 << 31

_LEAST = -_LOW
"""The first marker of a salt. Those of contents begin at -1 and go down."""

_LONG_SALT = 64
"""Characters up to which a salt is remembered as it is."""

_KEY = "radix_key"
"""The attribute in which a request carries its key, to go when it goes."""

_HOME = "radix_home"
"""The attribute in which it carries its namespace, once there are public prefixes."""


class _Prefixes(Protocol):
    def length(self, prompt: Sequence[int]) -> int: ...


class _Home(NamedTuple):
    """Where a request is cached, and from where on with its own salt alone.

    Attributes:
        namespace: of its blocks.
        start: its first private token, if the namespace is shared; else -1.
        marker: in place of that token.
    """

    namespace: Namespace
    start: int = -1
    marker: int = 0


class ContentIds:
    """Gives equal contents equal numbers, exactly, not by hash.

    Numbers are never given twice, so forgetting the oldest contents costs a
    hit at worst, never a wrong one.

    Args:
        capacity: contents remembered; more than a cache has blocks, so that what is
            forgotten has mostly been evicted.
    """

    def __init__(self, capacity: int = _MIN_MARKERS) -> None:
        self._capacity = capacity
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._next = 0

    def number(self, content: Hashable) -> int:
        """Return the number of ``content``: at least 0, fits 62 bits. O(1)."""
        known = self._numbers.get(content)
        if known is not None:
            self._numbers.move_to_end(content)
            return known
        self._numbers[content] = self._next
        self._next += 1
        if len(self._numbers) > self._capacity:
            self._numbers.popitem(last=False)
        return self._next - 1


class RequestKeys:
    """Keys of requests, encoded once and extended as requests grow.

    Args:
        block_size: tokens in a block.
        num_blocks: blocks of the cache.

    Attributes:
        public: tells how much of a prompt all salts share; None: nothing.
    """

    def __init__(self, block_size: int, num_blocks: int = 0) -> None:
        self.block_size = block_size
        capacity = max(_MIN_MARKERS, _MARKERS_PER_BLOCK * num_blocks)
        self.markers = ContentIds(capacity)
        self.public: _Prefixes | None = None
        self._salts = ContentIds()

    def namespace(self, request: Request) -> Namespace:
        """Return the namespace of a request's blocks.

        Its ``owner``, or what all salts share, if its prompt begins with something
        public.
        """
        return self.owner(request) if self.public is None else self._home(request)[0]

    def num_public(self, request: Request) -> int:
        """Return the tokens of a request that all salts share: whole blocks."""
        return 0 if self.public is None else max(0, self._home(request).start)

    def _home(self, request: Request) -> _Home:
        """Return where a request is cached; decided once, by its prompt."""
        known: _Home | None = request.__dict__.get(_HOME)
        if known is None:
            known = request.__dict__[_HOME] = self._find_home(request)
        return known

    def _find_home(self, request: Request) -> _Home:
        owner, prompt = self.owner(request), request.prompt_token_ids
        assert self.public is not None
        if request.resumable or request.prompt_embeds is not None or not prompt:
            return _Home(owner)
        # Contents of media are a client's.
        ends = [f.mm_position.offset for f in request.mm_features or ()]
        length = min([self.public.length(prompt), *ends])
        start = num_shared(length, len(prompt), self.block_size)
        if not start:
            return _Home(owner)
        salt: Hashable = request.cache_salt or None
        if salt is not None and len(request.cache_salt) > _LONG_SALT:
            # What is remembered of a client is bounded, whatever it sends.
            salt = sha256(request.cache_salt.encode("utf-8", "surrogatepass")).digest()
        number = self._salts.number((salt, prompt[start]))
        if number >= _LOW >> 1:
            return _Home(owner)  # all markers are used up
        lora = request.lora_request
        adapter = None if lora is None else self.owner(request)[1:-1]  # type: ignore
        return _Home(("public", adapter), start, _LEAST + number)

    @staticmethod
    def owner(request: Request) -> Namespace:
        """Return what tells whose a request's private blocks are: adapter and salt.

        An adapter is told by its id as well: one that is saved anew under the same
        name and path gets another id, and computes another KV.
        """
        lora, salt = request.lora_request, request.cache_salt
        if lora is None:
            return salt and ("salt", salt)
        return "lora", lora.lora_name, lora.lora_path, lora.lora_int_id, salt or None

    @staticmethod
    def is_plain(request: Request) -> bool:
        """Whether a request's tokens say it all, and never change again."""
        return not (
            request.mm_features
            or request.prompt_embeds is not None
            or request.resumable
        )

    def key(self, request: Request, num_tokens: int) -> bytes:
        """Return a key of at least ``num_tokens`` tokens.

        O(new tokens), and a copy if it is to end inside a block. Tokens after the last
        whole block are there for plain requests only. Once a request has grown, its
        key is a ``bytearray``, which later calls extend: not to be kept.

        Raises:
            ValueError: the request has fewer tokens.
        """
        size = self.block_size
        # A streaming session replaces tokens it had: nothing of it is kept.
        known: bytes | bytearray = request.__dict__.get(_KEY, b"")
        have = len(known) // BYTES_PER_TOKEN
        if have >= num_tokens:
            return cast(bytes, known)
        total = request.num_tokens
        if total < num_tokens:
            raise ValueError(
                f"request {request.request_id} has {total} tokens, not {num_tokens}"
            )
        # Whole blocks only, so that markers never change afterwards.
        whole = total // size * size
        if have < whole:
            tokens = request.all_token_ids[have:whole]
            tokens = self._salted(request, tokens, have)
            if request.mm_features or request.prompt_embeds is not None:
                tokens = list(tokens)
                self._mark(request, tokens, have // size)
            if known and isinstance(known, bytes):
                known = bytearray(known)
            known += encode(tokens)
            if not request.resumable:
                request.__dict__[_KEY] = known
        if whole < num_tokens and self.is_plain(request):
            known = known + self.part(request, whole, num_tokens)
        return cast(bytes, known)

    def part(self, request: Request, start: int, end: int) -> bytes:
        """Return part of the key of a request, without marks of media: O(its tokens).

        Args:
            request: the request.
            start: first token.
            end: token before which it ends.
        """
        return encode(self._salted(request, request.all_token_ids[start:end], start))

    def _salted(
        self, request: Request, tokens: Sequence[int], start: int
    ) -> Sequence[int]:
        """Return tokens of a request from ``start`` on, with the marker of its salt."""
        if self.public is not None:
            home = self._home(request)
            if start <= home.start < start + len(tokens):
                tokens = list(tokens)
                tokens[home.start - start] = home.marker
        return tokens

    def without_salt(self, request: Request, key: bytes) -> bytes:
        """Return a key of a request as it is where nothing is public: O(its bytes)."""
        if self.public is None:
            return key
        _, start, marker = self._home(request)
        at, after = start * BYTES_PER_TOKEN, (start + 1) * BYTES_PER_TOKEN
        if start < 0 or key[at:after] != encode([marker]):
            return key
        return key[:at] + encode([request.all_token_ids[start]]) + key[after:]

    def _mark(self, request: Request, tokens: list[int], first: int) -> None:
        """Put markers into blocks that hold media or embeddings, in place.

        In place of the first token, negative, and of the second, where there is one.
        O(blocks + media).
        """
        size, medium = self.block_size, 0
        for at in range(0, len(tokens), size):
            start = first * size + at
            extra, medium = generate_block_hash_extra_keys(
                request, start, start + size, medium
            )
            content = tuple(e for e in extra or () if e[0] not in _IN_NAMESPACE)
            if size == 1 and all(e[0] == "mm" and e[2] < 0 for e in content):
                # Inside a medium: its first token tells which, and comes before.
                continue
            if content:
                replaced = tuple(tokens[at : at + min(size, 2)])
                number = self.markers.number((content, replaced))
                high, low = divmod(number, _LOW) if size > 1 else (number, 0)
                tokens[at] = -1 - high
                if size > 1:
                    tokens[at + 1] = low
