"""Writes a trace beside the engine: a thread, and a queue with a bound.

The scheduler hands over what it knows of a request that has ended, and goes on. What
it shares with earlier ones is found in the thread. When that falls behind, requests
are dropped and counted; when the disk does not take a line, recording ends, and
serving goes on.
"""

import atexit
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_radix.record.known_sequences import KnownSequences
from vllm_radix.record.trace_file import TraceFile
from vllm_radix.tree import BYTES_PER_TOKEN, Namespace, decode

_logger = logging.getLogger("vllm.radix")

_MAX_QUEUED_BYTES = 64 << 20
"""Keys that wait to be written, at most."""
_PER_REQUEST = 256
"""Bytes of a request beside its key, as the bound counts them."""
_SECONDS_TO_CLOSE = 10.0
_MEGABYTE = 1 << 20


class EndedRequest(NamedTuple):
    """What is known of a request when it has ended.

    Attributes:
        number: how many requests had come before it.
        arrival: when it came, in seconds after the first.
        key: its tokens, answer included, as far as they can be shared.
        input_length: tokens of the prompt.
        output_length: tokens of the answer.
        ended: why it did.
        cached: tokens of the prompt that were cached when it was first admitted; None
            if it never was.
        namespace: its salt and its adapter.
        tenant: empty if tenants are not told apart.
        priority: of vLLM's priority policy.
        plain: whether ``key`` is made of token ids alone.
        grain: tokens of which it shares all or none.
        hints: of its client.
    """

    number: int
    arrival: float
    key: bytes
    input_length: int
    output_length: int
    ended: str
    cached: int | None = None
    namespace: Namespace = None
    tenant: str = ""
    priority: int = 0
    plain: bool = True
    grain: int = 1
    hints: Mapping[str, Any] = MappingProxyType({})


class TraceWriter:
    """Writes requests that have ended, each on a line.

    Args:
        path: of the file; see ``TraceFile``.
        limit_mb: megabytes of the file from which on a new one is begun.
        max_known_tokens: tokens of earlier requests that are kept in memory.
        header: fields of the first line.
        tokens: whether to write token ids.

    Attributes:
        num_dropped: requests that were not written, because the thread was behind.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        limit_mb: int,
        max_known_tokens: int,
        header: Mapping[str, Any],
        tokens: bool = False,
    ) -> None:
        self._file = TraceFile(path, limit_mb * _MEGABYTE, header)
        self._known = KnownSequences(max_known_tokens)
        self._tokens = tokens
        self._secret = secrets.token_bytes(32)
        self._num_written = 0
        self._told_dropped = 0
        self.num_dropped = 0
        # Each of the two has one writer, so that they need no lock.
        self._bytes_put = self._bytes_done = 0
        self._queue: SimpleQueue[EndedRequest | None] = SimpleQueue()
        self._is_open = True
        self._thread = Thread(target=self._work, name="radix-record", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, request: EndedRequest) -> None:
        """Hand a request over, O(1); drop it if too much waits already."""
        if not self._is_open:
            return
        if self._bytes_put - self._bytes_done > _MAX_QUEUED_BYTES:
            if not self.num_dropped:
                _logger.warning(
                    "Recording falls behind: requests are left out of %s, and counted "
                    "in its lines as 'dropped'.",
                    self._file.path,
                )
            self.num_dropped += 1
            return
        self._bytes_put += len(request.key) + _PER_REQUEST
        self._queue.put(request)

    def close(self) -> None:
        """Write what waits, and put it in safety; a second call does nothing."""
        atexit.unregister(self.close)
        if self._is_open:
            self._is_open = False
            self._queue.put(None)
        self._thread.join(_SECONDS_TO_CLOSE)

    def _work(self) -> None:
        """Write until closed, or until something goes wrong."""
        try:
            while (request := self._queue.get()) is not None:
                self._write(request)
                self._bytes_done += len(request.key) + _PER_REQUEST
            self._file.close()
        # Whatever it is: a server does not stop for its trace.
        except Exception as error:
            self._is_open = False
            with suppress(OSError):
                self._file.close()
            _logger.error(
                "Recording to %s ends here, and serving goes on: %s",
                self._file.path,
                error,
            )
            return
        _logger.info(
            "Recorded %d requests to %s; dropped: %d",
            self._num_written,
            self._file.path,
            self.num_dropped,
        )

    def _write(self, request: EndedRequest) -> None:
        if self._file.is_full:
            self._file.begin_anew()
            self._known.forget_all()
            self._secret = secrets.token_bytes(32)
        key = request.key
        of, shared = self._known.add(key, request.namespace, request.number)
        shared -= shared % request.grain
        fields: dict[str, Any] = {
            "request": request.number,
            "arrival": request.arrival,
            "input_length": request.input_length,
            "output_length": request.output_length,
        }
        if shared:
            fields |= {"of": of, "shared": shared}
        if request.namespace is not None:
            fields["salt"] = self._hidden(request.namespace)
        if request.tenant:
            fields["tenant"] = self._hidden(request.tenant)
        if request.priority:
            fields["priority"] = request.priority
        if request.hints:
            fields["hints"] = dict(request.hints)
        if request.cached is not None:
            fields["cached"] = request.cached
        fields["ended"] = request.ended
        dropped = self.num_dropped
        if dropped > self._told_dropped:
            fields["dropped"] = dropped - self._told_dropped
        if self._tokens and request.plain:
            fields["new_ids"] = decode(key[shared * BYTES_PER_TOKEN :])
        self._file.write(fields)
        self._told_dropped = dropped
        self._num_written += 1

    def _hidden(self, name: object) -> str:
        """Return a name that is the same for the same one, in this file only."""
        return blake2b(repr(name).encode(), key=self._secret, digest_size=8).hexdigest()
