"""Requests to servers that answer in ways of their own."""

import socket
import threading
import time
from contextlib import closing

import pytest

from vllm_radix_bench.ab import web
from vllm_radix_bench.ab.web import HttpError, get, get_json

OK = b"HTTP/1.1 200 OK\r\n"


def served(*parts, pause=0.0):
    """Return the URL of a server that answers once, with bytes as they are."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        with closing(listener), closing(listener.accept()[0]) as one:
            one.recv(4096)
            try:
                for part in parts:
                    one.sendall(part)
                    time.sleep(pause)
            except OSError:
                return  # it was left

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/x"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"\x00\x01garbage\r\n\r\n", "the reply is not HTTP"),
        (OK + b"Content-Length: 9\r\n\r\nabc", "the reply ends 6 bytes too early"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "the reply is not HTTP"),
        (OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", "the reply is not HTTP"),
    ],
)
def test_what_is_not_http(reply, said):
    with pytest.raises(HttpError, match=said):
        get(served(reply))


def test_json_without_a_bottom():
    deep = b"[" * 200_000
    head = OK + b"Content-Length: %d\r\n\r\n" % len(deep)
    with pytest.raises(HttpError, match="the reply is not JSON"):
        get_json(served(head + deep))


def test_a_server_that_drips_is_left():
    url = served(OK + b"\r\n", *[b"a"] * 200, pause=0.1)
    began = time.monotonic()
    with pytest.raises(HttpError, match="not complete after 1 s"):
        get(url, timeout=1.0)
    assert time.monotonic() - began < 10


def test_a_reply_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr(web, "_MAX_BYTES", 1 << 20)
    with pytest.raises(HttpError, match="more than 1 MiB"):
        get(served(OK + b"\r\n", *[b"a" * (1 << 18)] * 20))


def test_a_key_goes_to_no_other_server():
    head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/y\r\n"
    url = served(head + b"Content-Length: 0\r\n\r\n")
    with pytest.raises(
        HttpError, match=r"302: it redirects to http://127\.0\.0\.1:9/y"
    ):
        get(url, {"Authorization": "Bearer secret"})
