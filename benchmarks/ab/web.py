"""Small requests to a server: is it there, what does it say."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a key is for the server that was named, and no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return nothing: the reply is an error of its own status."""


# A proxy is for other machines.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
_MAX_BYTES = 64 << 20
_CHUNK = 1 << 16


def _ask(request: urllib.request.Request, timeout: float) -> bytes:
    """Return a reply that is whole in time, however it comes.

    Raises:
        HttpError: there is none.
    """
    ends = time.monotonic() + timeout
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            body = bytearray()
            # What is there: a read of all waits anew for each part.
            while part := reply.read1(_CHUNK):
                body += part
                if time.monotonic() > ends:
                    raise HttpError(f"the reply is not complete after {timeout:.0f} s")
                if len(body) > _MAX_BYTES:
                    raise HttpError(f"the reply has more than {_MAX_BYTES >> 20} MiB")
            if reply.length:
                raise HttpError(f"the reply ends {reply.length} bytes too early")
            return bytes(body)
    except urllib.error.HTTPError as error:
        where = error.headers.get("Location")
        to = f": it redirects to {where}" if where else ""
        raise HttpError(f"HTTP status {error.code}{to}", error.code) from error
    except http.client.HTTPException as error:
        raise HttpError(f"the reply is not HTTP ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise HttpError(str(getattr(error, "reason", error))) from error


def get(
    url: str, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> bytes:
    """Return what is at a URL.

    Raises:
        HttpError: nothing.
    """
    return _ask(urllib.request.Request(url, headers=dict(headers or {})), timeout)


def get_json(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return the JSON at a URL.

    Raises:
        HttpError: there is none.
    """
    try:
        return json.loads(get(url, headers))
    except (ValueError, RecursionError) as error:
        raise HttpError("the reply is not JSON") from error


def post(
    url: str, headers: Mapping[str, str] | None = None, timeout: float = 120.0
) -> bytes:
    """Post nothing to a URL; return the reply.

    Raises:
        HttpError: it was refused.
    """
    request = urllib.request.Request(url, data=b"", headers=dict(headers or {}))
    return _ask(request, timeout)


def post_json(
    url: str, body: Any, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> Any:
    """Post JSON to a URL; return the reply's.

    Raises:
        HttpError: it was refused, or the reply is not JSON.
    """
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), sent)
    try:
        return json.loads(_ask(request, timeout))
    except (ValueError, RecursionError) as error:
        raise HttpError("the reply is not JSON") from error
