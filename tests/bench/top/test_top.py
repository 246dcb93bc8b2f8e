"""``vllm-radix top``: canned pages of a stock server and of radix's."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO

import pytest

from support.servers import free_port
from vllm_radix.cli import main
from vllm_radix_bench.top import cli
from vllm_radix_bench.top.scrape import AddressError, Page, address
from vllm_radix_bench.top.view import heading, lines, record, show

STOCK = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1234567.0
vllm:num_requests_waiting{engine="1",model_name="m"} 6.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 9.87654321e+08
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 500.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 1.23456789e+08
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 2000.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 2.0
"""
ONE = "\n".join(line for line in STOCK.splitlines() if 'engine="1"' not in line) + "\n"
OURS = (
    STOCK
    + """\
# TYPE vllm_radix:queried_tokens counter
vllm_radix:queried_tokens_total{engine="0",model_name="m"} 1000.0
# TYPE vllm_radix:hit_tokens counter
vllm_radix:hit_tokens_total{engine="0",model_name="m",where="block_end"} 440.0
vllm_radix:hit_tokens_total{engine="0",model_name="m",where="inside"} 60.0
# TYPE vllm_radix:evicted_blocks counter
vllm_radix:evicted_blocks_total{engine="0",model_name="m",reason="room"} 70.0
vllm_radix:evicted_blocks_total{engine="0",model_name="m",reason="reset"} 5.0
# TYPE vllm_radix:admissions counter
vllm_radix:admissions_total{engine="0",model_name="m",reason="turn"} 50.0
vllm_radix:admissions_total{engine="0",model_name="m",reason="prefix"} 30.0
vllm_radix:admissions_total{engine="0",model_name="m",reason="group"} 8.0
vllm_radix:admissions_total{engine="0",model_name="m",reason="guard"} 12.0
vllm_radix:admissions_total{engine="0",model_name="m",reason="wait"} 0.0
# TYPE vllm_radix:cached_blocks gauge
vllm_radix:cached_blocks{engine="0",model_name="m"} 400.0
vllm_radix:cached_blocks{engine="1",model_name="m"} 410.0
# TYPE vllm_radix:pool_blocks gauge
vllm_radix:pool_blocks{engine="0",model_name="m"} 499.0
vllm_radix:pool_blocks{engine="1",model_name="m"} 499.0
# TYPE vllm_radix:longest_overtaking gauge
vllm_radix:longest_overtaking{engine="0",model_name="m"} 17.0
vllm_radix:longest_overtaking{engine="1",model_name="m"} 3.0
# TYPE vllm_radix:max_overtakes gauge
vllm_radix:max_overtakes{engine="0",model_name="m"} 1000.0
vllm_radix:max_overtakes{engine="1",model_name="m"} 1000.0
# TYPE vllm_radix:info gauge
vllm_radix:info{engine="0",eviction="lru",manager="RadixKVCacheManager",model_name="m",\
patience="1",policy="prefix",version="0.1.0"} 1.0
"""
)


class Server:
    """Answers at ``/metrics`` with what it is told, and 404 elsewhere."""

    def __init__(self):
        server = self
        self.text, self.looks = OURS, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path == "/metrics"
                server.looks += found
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(server.text.encode() if found else b"")

            def log_message(self, *arguments):
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def shown(text, width, before=None, seconds=2.0):
    out = StringIO()
    first = None if before is None else Page(before, 10.0)
    show(cli._plain(out, width), Page(text, 10.0 + seconds), first)
    return out.getvalue()


def row(text, title):
    """Return the words of a row after its title."""
    line = next(one for one in text.splitlines() if title in one)
    return line.partition(title)[2].replace("│", " ").split()


@pytest.mark.parametrize("width", (20, 60, 80, 140))
@pytest.mark.parametrize("text", (STOCK, ONE, OURS))
def test_no_figure_is_cut_at_any_width(text, width):
    printed = shown(text, width, before=text)
    assert "…" not in printed
    for line in lines(Page(text, 12.0), Page(text, 10.0)):
        for figure in f"{line.now} {line.total}".split():
            assert figure in printed, (line, width)
    if width >= 60:
        assert max(map(len, printed.splitlines())) <= width
        waiting = "1,234,567" if text == ONE else "1,234,573"
        assert row(printed, "requests waiting")[0] == waiting


def test_a_server_with_radix():
    printed = shown(OURS, 80)
    assert printed.startswith("m on 2 engines: radix 0.1.0, policy prefix, patience 1")
    assert row(printed, "prefix cache hit rate") == ["12.5%"]
    assert row(printed, "inside blocks") == ["60"]
    assert row(printed, "evicted blocks") == ["70"]
    assert row(printed, "ahead of their turn") == ["38"]
    assert row(printed, "bound: guard") == ["12"]
    assert "bound: wait" not in printed
    assert row(printed, "longest overtaking") == ["17", "of", "1,000"]
    assert row(printed, "time to first token") == ["0.50", "s"]
    assert row(printed, "│ 1 ")[:6] == ["4", "6", "410", "of", "499", "12.5%"]


def test_a_stock_server_has_fewer_rows():
    page = Page(ONE)
    assert heading(page) == "m: stock vLLM: what is radix's own is missing"
    titles = [line.title for line in lines(page, None)]
    assert titles == [line.title for line in lines(Page(OURS), None)
                      if line.title in titles]  # fmt: skip
    assert "prefix cache hit rate" in titles and "requests admitted" not in titles
    assert len(titles) < len(lines(Page(OURS), None))
    assert "Engines" not in shown(ONE, 80) and "Engines" in shown(STOCK, 80)


def test_before_its_first_request_a_server_says_that_it_is_radix():
    text = "".join(line for line in OURS.splitlines(True) if ":info" not in line)
    assert "radix; it says more after its first request" in heading(Page(text))


def test_what_was_counted_lately_is_for_a_second():
    later = OURS.replace('"inside"} 60.0', '"inside"} 100.0')
    later = later.replace("hits_total{engine=\"0\",model_name=\"m\"} 500.0",
        "hits_total{engine=\"0\",model_name=\"m\"} 540.0")  # fmt: skip
    later = later.replace("queries_total{engine=\"0\",model_name=\"m\"} 1000.0",
        "queries_total{engine=\"0\",model_name=\"m\"} 1050.0")  # fmt: skip
    printed = shown(later, 80, before=OURS, seconds=5.0)
    assert "last 5 s" in printed
    assert row(printed, "inside blocks") == ["8.0/s", "100"]
    assert row(printed, "prefix cache hit rate") == ["80.0%", "12.5%"]
    assert row(printed, "evicted blocks") == ["0.0/s", "70"]


def test_a_restart_counts_from_the_start():
    printed = shown(OURS.replace('"room"} 70', '"room"} 10'), 80, before=OURS)
    assert row(printed, "evicted blocks") == ["5.0/s", "10"]


def test_json_has_the_numbers():
    seen = record("u", Page(OURS, 14.0), Page(OURS, 10.0))
    assert seen["engines"] == ["0", "1"] and seen["models"] == ["m"]
    assert seen["total"]["hit tokens"] == 123457289
    assert seen["lately"]["hit tokens"] == 0 and seen["seconds"] == 4
    assert seen["now"]["blocks cached"] == 810
    assert seen["radix"]["policy"] == "prefix"
    assert record("u", Page(ONE), None)["radix"] is None


# -- the command ---------------------------------------------------------------


@pytest.mark.parametrize("end", ("", "/", "/metrics", "/v1"))
def test_once(server, capsys, end):
    assert main(["top", server.base + end, "--once"]) == 0
    assert "radix 0.1.0" in capsys.readouterr().out
    assert main(["top", server.base.removeprefix("http://"), "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["evicted blocks"] == 70


def test_it_looks_again_and_again_until_interrupted(server, capsys, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert main(["top", server.base, "--json", "--interval", "7"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["lately" in one for one in printed] == [False, True, True]
    assert pauses == [7, 7, 7] and server.looks == 3


def test_on_a_terminal_it_stays_and_waits_for_a_server_that_is_gone(
    server, monkeypatch
):
    class Terminal(StringIO):
        def isatty(self):
            return True

    pauses, out = [], Terminal()

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 1:
            server.close()
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", sleep)
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "60")
    assert main(["top", server.base]) == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue())
    assert "requests waiting" in text and "Ctrl-C ends" in text
    assert "does not answer" in text
    monkeypatch.undo()


@pytest.mark.parametrize(
    "text", ("ftp://a", "http://", "http://a:b", "a b", "http://a:99999", "")
)
def test_what_is_no_address_is_refused(text, capsys):
    assert main(["top", text, "--once"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-radix top: URL: {text!r} is not the address")
    assert error.count("\n") == 1


def test_another_server_is_refused(server, capsys):
    assert main(["top", f"{server.base}/other", "--once"]) == 2
    assert "answers with HTTP status 404" in capsys.readouterr().err
    server.text = "# TYPE up gauge\nup 1.0\n"
    assert main(["top", server.base, "--once"]) == 2
    assert "shows no metrics of vLLM's" in capsys.readouterr().err
    server.text = "<html>{</html>"
    assert main(["top", server.base, "--once"]) == 2
    assert "but shows no metrics" in capsys.readouterr().err


def test_where_nothing_answers(capsys):
    assert main(["top", f"127.0.0.1:{free_port()}", "--once"]) == 3
    assert "does not answer: " in capsys.readouterr().err


@pytest.mark.parametrize("interval", ("0", "x", "nan", "-1"))
def test_a_bad_interval_is_refused(interval, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["top", "a:1", "--interval", interval])
    assert stop.value.code == 2
    assert "from 0.1 to 3600" in capsys.readouterr().err


def test_addresses():
    assert address("host:1") == "http://host:1/metrics"
    assert address("https://host/base/v1/") == "https://host/base/metrics"
    with pytest.raises(AddressError, match="localhost:8000"):
        address("host:port")
