"""Requests to servers that answer in ways of their own."""

import socket
import threading
import time
from contextlib import closing

import pytest

from vllm_radix_bench.ab import web
from vllm_radix_bench.ab.web import HttpError, get, get_json, post, post_json

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


@pytest.mark.parametrize(
    "parts",
    [
        [OK + b"\r\n", *[b"a"] * 200],
        [OK, *[b"X: a\r\n"] * 200],
        [OK + b"X: ", *[b"a"] * 200],
        [b"HTTP/1.1 200 ", *[b"O"] * 200],
        [*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 200],
        [b""],
    ],
    ids=["body", "headers", "a header", "status", "continue", "nothing"],
)
def test_a_server_that_drips_is_left(parts):
    url = served(*parts, pause=0.1 if len(parts) > 1 else 20)
    began = time.monotonic()
    with pytest.raises(HttpError, match=r"not complete after 0\.3 s"):
        get(url, timeout=0.3)
    assert time.monotonic() - began < 10


def test_a_reply_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr(web, "_MAX_BYTES", 1 << 20)
    with pytest.raises(HttpError, match="more than 1 MiB"):
        get(served(OK + b"\r\n", *[b"a" * (1 << 18)] * 20))


KEY = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "ask",
    [
        lambda url: get(url, KEY),
        lambda url: post(url, KEY),
        lambda url: post_json(url, {}, KEY),
    ],
    ids=["get", "post", "post_json"],
)
def test_the_target_of_a_redirect_is_not_asked(ask, status):
    with socket.create_server(("127.0.0.1", 0)) as target:
        where = f"http://127.0.0.1:{target.getsockname()[1]}/y"
        head = b"HTTP/1.1 %d Found\r\nLocation: %s\r\n" % (status, where.encode())
        url = served(head + b"Content-Length: 0\r\n\r\n")
        with pytest.raises(HttpError, match=f"{status}, a redirect to {where}") as seen:
            ask(url)
        assert seen.value.status == status
        # It would be in the queue of those that have connected.
        target.setblocking(False)
        with pytest.raises(BlockingIOError):
            target.accept()


def test_no_proxy_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert get(served(OK + b"Content-Length: 2\r\n\r\nab")) == b"ab"


@pytest.mark.parametrize("url", ["foo", "ftp://a/x", "http://", "file:///etc/hostname"])
def test_what_is_no_address(url):
    with pytest.raises(HttpError, match="is not an address of HTTP"):
        get_json(url)


def test_a_name_that_no_machine_has():
    with pytest.raises(HttpError, match="label"):
        get(f"http://{'a' * 70}:1/")
