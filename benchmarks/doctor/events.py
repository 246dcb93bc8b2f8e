"""What servers publish of their caches, heard at several endpoints at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from vllm_radix_bench.top.kv_events import Batch, BlockStored, connected

_SUBSCRIBED_SECONDS = 0.5
"""After which a publisher knows of a new subscriber."""


@dataclass(frozen=True)
class Heard:
    """A message of a publisher.

    Attributes:
        endpoint: at which it was heard.
        topic: under which it was published.
        stored: its events of blocks that were cached; None if it is of no known form.
    """

    endpoint: str
    topic: str
    stored: tuple[BlockStored, ...] | None

    def begin_of(self, tokens: Sequence[int]) -> BlockStored | None:
        """Return what it tells of the first block of a prompt; None if nothing."""
        for event in self.stored or ():
            size = event.block_size
            is_first = event.parent_block_hash is None and 0 < size <= len(tokens)
            if is_first and event.token_ids[:size] == [*tokens[:size]]:
                return event
        return None


class Listener:
    """Hears publishers, from when it is made on.

    Args:
        endpoints: of ZMQ, at which something listens.

    Raises:
        AddressError: ZMQ does not connect to one.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._endpoint_of: dict[zmq.Socket[bytes], str] = {}
        for endpoint in endpoints:
            option = "--kv-event-source"
            socket = connected(self._context, zmq.SUB, option, endpoint)
            self._poller.register(socket, zmq.POLLIN)
            self._endpoint_of[socket] = endpoint
        if endpoints:
            time.sleep(_SUBSCRIBED_SECONDS)

    def hear(
        self, seconds: float, enough: Callable[[Heard], bool] = lambda heard: False
    ) -> list[Heard]:
        """Return what comes within a time, up to a message that is enough."""
        found: list[Heard] = []
        until = time.monotonic() + seconds
        while self._endpoint_of and (left := until - time.monotonic()) > 0:
            for socket, _ in self._poller.poll(int(left * 1000) + 1):
                found.append(
                    self._message(self._endpoint_of[socket], socket.recv_multipart())
                )
                if enough(found[-1]):
                    return found
        return found

    def _message(self, endpoint: str, frames: Sequence[bytes]) -> Heard:
        topic = frames[0].decode(errors="replace") if len(frames) > 2 else ""
        try:
            events = self._decoder.decode(frames[-1]).events
        except msgspec.MsgspecError:
            return Heard(endpoint, topic, None)
        stored = tuple(one for one in events if isinstance(one, BlockStored))
        return Heard(endpoint, topic, stored)

    def close(self) -> None:
        """Close its connections."""
        self._context.destroy(linger=0)
