"""Small requests to a server: is it there, what does it say."""

import http.client
import io
import json
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit


def bearer(key: str | None) -> dict[str, str]:
    """Return the headers of a request that carries a key; none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class HttpError(Exception):
    """A server cannot be reached, or refuses; the message says which.

    Attributes:
        status: of HTTP, if it refuses.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


_MAX_BYTES = 64 << 20
_CHUNK = 1 << 16


class _InTime(io.RawIOBase):
    """Reads a socket until a time that does not move, however bytes come.

    Args:
        source: of the bytes; its timeout is that of all of them together.
    """

    def __init__(self, source: socket.socket) -> None:
        self._socket, self._raw = source, source.makefile("rb", buffering=0)
        self._seconds = source.gettimeout() or 0.0
        self._ends = time.monotonic() + self._seconds

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there.

        Raises:
            TimeoutError: the time is over.
        """
        left = self._ends - time.monotonic()
        try:
            # A timeout of 0 would be none.
            self._socket.settimeout(max(left, 0.001))
            if left > 0:
                return self._raw.readinto(buffer)
        except TimeoutError:
            pass
        raise TimeoutError(f"the reply is not complete after {self._seconds:g} s")

    def close(self) -> None:
        """Let the socket go."""
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A reply whose status, headers and body come in time."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_InTime(sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _TlsConnection(http.client.HTTPSConnection):
    response_class = _Response


def _ask(
    method: str,
    url: str,
    headers: Mapping[str, str] | None,
    body: bytes | None,
    timeout: float,
) -> bytes:
    """Return a reply that is whole in time, however it comes.

    No proxy is asked: it is for other machines. No redirect is followed: a key is for
    the server that was named, and no other.

    Raises:
        HttpError: there is none.
    """
    try:
        parts = urlsplit(url)
        kinds = {"http": _Connection, "https": _TlsConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise HttpError(f"{url!r} is not an address of HTTP")
        kind = kinds[parts.scheme]
        with closing(kind(parts.hostname, parts.port, timeout=timeout)) as connection:
            path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            sent = {"Connection": "close", **(headers or {})}
            connection.request(method, path, body, sent)
            with connection.getresponse() as reply:
                if not 200 <= reply.status < 300:
                    where = reply.headers.get("Location")
                    to = f", a redirect to {where}" if where else ""
                    raise HttpError(f"HTTP status {reply.status}{to}", reply.status)
                return _whole(reply)
    except http.client.HTTPException as error:
        raise HttpError(f"the reply is not HTTP ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise HttpError(str(error) or type(error).__name__) from error


def _whole(reply: http.client.HTTPResponse) -> bytes:
    """Return the body of a reply.

    Raises:
        HttpError: it is cut off, or too large.
        OSError: it takes too long.
    """
    body = bytearray()
    while part := reply.read1(_CHUNK):
        body += part
        if len(body) > _MAX_BYTES:
            raise HttpError(f"the reply has more than {_MAX_BYTES >> 20} MiB")
    if reply.length:
        raise HttpError(f"the reply ends {reply.length} bytes too early")
    return bytes(body)


def get(
    url: str, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> bytes:
    """Return what is at a URL.

    Raises:
        HttpError: nothing.
    """
    return _ask("GET", url, headers, None, timeout)


def get_json(
    url: str, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> Any:
    """Return the JSON at a URL.

    Raises:
        HttpError: there is none.
    """
    return _json(get(url, headers, timeout))


def post(
    url: str, headers: Mapping[str, str] | None = None, timeout: float = 120.0
) -> bytes:
    """Post nothing to a URL; return the reply.

    Raises:
        HttpError: it was refused.
    """
    return _ask("POST", url, headers, None, timeout)


def post_json(
    url: str, body: Any, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> Any:
    """Post JSON to a URL; return the reply's.

    Raises:
        HttpError: it was refused, or the reply is not JSON.
    """
    sent = {"Content-Type": "application/json", **(headers or {})}
    return _json(_ask("POST", url, sent, json.dumps(body).encode(), timeout))


def _json(text: bytes) -> Any:
    """Return what JSON says.

    Raises:
        HttpError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HttpError("the reply is not JSON") from error
