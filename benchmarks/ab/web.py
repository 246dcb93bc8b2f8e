"""Small requests to a server: is it there, what does it say."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any


class HttpError(Exception):
    """A server cannot be reached, or refuses; the message says which.

    Attributes:
        status: of HTTP, if it refuses.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


# A proxy is for other machines.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(request: urllib.request.Request, timeout: float) -> bytes:
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            body: bytes = reply.read()
            return body
    except urllib.error.HTTPError as error:
        raise HttpError(f"HTTP status {error.code}", error.code) from error
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
    except ValueError as error:
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
    except ValueError as error:
        raise HttpError("the reply is not JSON") from error
