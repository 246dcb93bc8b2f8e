"""What a server tells of its cache: vLLM's KV events, over ZMQ.

The messages are those of `vllm.distributed.kv_events`. Fields that a tree of blocks
does not need are left out, and so is vLLM's own module, whose import takes seconds.
"""

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_radix_bench.top.scrape import AddressError, NoAnswerError

BlockHash = bytes | int
_CONNECT_SECONDS = 5.0
_REPLAY_SECONDS = 10.0
_END = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that were cached, each below the one before."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks that are cached no longer."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is cached any more."""


class Batch(msgspec.Struct, array_like=True):
    """The events of a step of an engine."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def check_endpoint(option: str, text: str) -> str:
    """Return an endpoint of ZMQ.

    Raises:
        AddressError: it is none that can be connected to.
    """
    try:
        parts = urlsplit(text)
        tcp = bool(parts.hostname) and bool(parts.port) and "@" not in parts.netloc
        tcp = tcp and text == f"tcp://{parts.netloc}" and parts.hostname != "*"
    except ValueError:
        tcp = False
    # The length of a path is the system's limit of sockets.
    path = text.removeprefix("ipc://")
    if not (tcp or (path != text and 0 < len(path.encode()) < 108)):
        raise AddressError(
            f"{option}: {text!r} is no endpoint, such as tcp://localhost:5557 or "
            "ipc://PATH"
        )
    # Not before it is used does ZMQ say what it makes of it.
    with zmq.Context() as context:
        connected(context, zmq.SUB, option, text).close(linger=0)
    return text


def connected(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: int, option: str, endpoint: str
) -> "zmq.Socket[bytes]":
    """Return a socket that is connected to an endpoint, and keeps all that comes.

    Args:
        context: of the socket.
        kind: of the socket; one that subscribes hears every topic.
        option: that named the endpoint.
        endpoint: to connect to.

    Raises:
        AddressError: ZMQ refuses.
    """
    made: zmq.Socket[bytes] | None = None
    try:
        made = context.socket(kind)
        made.setsockopt(zmq.RCVHWM, 0)
        if kind == zmq.SUB:
            made.setsockopt(zmq.SUBSCRIBE, b"")
        made.connect(endpoint)
    except zmq.ZMQError as error:
        if made is not None:
            made.close(linger=0)
        why = zmq.strerror(error.errno or 0)
        raise AddressError(
            f"{option}: ZMQ does not connect to {endpoint!r} ({why})"
        ) from error
    return made


def check_that_something_listens(option: str, endpoint: str) -> None:
    """Check it, as ZMQ would wait for it in silence.

    Raises:
        NoAnswerError: nothing listens.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp":
        return
    where = (str(parts.hostname), int(parts.port or 0))
    try:
        socket.create_connection(where, timeout=_CONNECT_SECONDS).close()
    # Of names that cannot be ones of machines, too.
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise NoAnswerError(
            f"{option}: nothing listens at {endpoint} ({why}): "
            "start the server with --kv-events-config "
            '\'{"enable_kv_cache_events": true, "publisher": "zmq"}\''
        ) from error


class Feed:
    """The events of a server's publisher, in order.

    Args:
        endpoint: at which it publishes.
        replay: at which it sends earlier events again; None for none.

    Raises:
        NoAnswerError: nothing listens at one of them.
        AddressError: ZMQ does not connect to one.
    """

    def __init__(self, endpoint: str, replay: str | None) -> None:
        check_that_something_listens("--events", endpoint)
        if replay is not None:
            check_that_something_listens("--replay", replay)
        self.endpoint, self._replay = endpoint, replay
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._context = zmq.Context()
        self._events = connected(self._context, zmq.SUB, "--events", endpoint)

    def earlier(self) -> Iterator[tuple[int, Batch]]:
        """Yield the numbers and batches that the server still has, if it is asked.

        Raises:
            NoAnswerError: it does not send them.
        """
        if self._replay is None:
            return
        asking = connected(self._context, zmq.DEALER, "--replay", self._replay)
        try:
            asking.send_multipart((b"", (0).to_bytes(8, "big")))
            while asking.poll(int(_REPLAY_SECONDS * 1000)):
                *_, number, payload = asking.recv_multipart()
                if number == _END:
                    return
                yield int.from_bytes(number, "big"), self._batch("--replay", payload)
            raise NoAnswerError(
                f"--replay: {self._replay} sent nothing for {_REPLAY_SECONDS:.0f} s"
            )
        finally:
            asking.close(linger=0)

    def read(self, seconds: float) -> Iterator[tuple[int, Batch]]:
        """Yield the numbers and batches that come within a time."""
        until = time.monotonic() + seconds
        while True:
            left = max(0.0, until - time.monotonic())
            if not self._events.poll(int(left * 1000)):
                return
            *_, number, payload = self._events.recv_multipart()
            yield int.from_bytes(number, "big"), self._batch("--events", payload)

    def _batch(self, option: str, payload: bytes) -> Batch:
        try:
            return self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise AddressError(
                f"{option}: what comes from {self.endpoint} is no KV event of "
                f"vLLM's ({error})"
            ) from error

    def close(self) -> None:
        """Close its connections."""
        self._context.destroy(linger=0)
