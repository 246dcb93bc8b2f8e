"""Metrics of real servers: what /metrics says is what happened, once."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.servers import NAME, serving
from vllm_radix.metrics.series import SERIES

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

DUMMY = ("--load-format", "dummy")


class Page:
    """What /metrics says at a moment."""

    def __init__(self, base):
        text = httpx.get(f"{base}/metrics").text
        self.families = {f.name: f for f in text_string_to_metric_families(text)}

    def sum(self, name, **labels):
        """Return the sum of a sample over the labels that are not given."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def engines(self, name):
        return {sample.labels["engine"] for sample in self.families[name].samples}


def wait_for(base, done):
    """Return the page that shows what is done; a step's statistics come after it."""
    deadline = time.monotonic() + 30
    while not done(page := Page(base)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return page


def ask(base, tokens, salt=None):
    """Return the text, and the cached tokens."""
    request = {"model": NAME, "prompt": tokens, "max_tokens": 4, "temperature": 0}
    request |= {"ignore_eos": True, "cache_salt": salt} if salt else {}
    reply = httpx.post(f"{base}/v1/completions", json=request, timeout=120).json()
    return reply["choices"][0]["text"], (
        reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    )


def prompts(seed):
    """Return prompts that are new, repeated, longer, and part inside blocks."""
    rng = random.Random(seed)
    text = [rng.randrange(10, 9000) for _ in range(300)]
    others = [text[:150] + [9, 8, 7] * 20, text[:61], text + [5] * 40]
    return [text, text, *others, [7] * 100, text[:200]]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics") / "log"


@pytest.fixture(scope="module")
def server(tiny, log):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOG_STATS_INTERVAL", "1")
        with serving(tiny, log, "--radix.explain", "true", *DUMMY) as base:
            yield base


def test_usage_stocks_counters_ours_and_explain_agree_request_by_request(server):
    totals = ["vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"]
    totals += ["vllm_radix:queried_tokens_total", "vllm_radix:hit_tokens_total"]
    totals += ["vllm_radix:missed_tokens_total", "vllm_radix:lookups_total"]

    def read(page):
        return [page.sum(name) for name in totals]

    before, cached_of = read(Page(server)), []
    for tokens in prompts("agree"):
        _, cached = ask(server, tokens)
        lookups = before[-1]
        page = wait_for(server, lambda page, n=lookups: read(page)[-1] > n)
        now = read(page)
        queries, hits, queried, hit, missed, looked = (
            after - earlier for earlier, after in zip(before, now, strict=True)
        )
        assert (queries, queried, looked) == (len(tokens), len(tokens), 1)
        # A token is computed always, for its logits.
        assert cached == hits == hit == len(tokens) - 1 - missed
        before = now
        cached_of.append(cached)
    assert cached_of[:3] == [0, 299, 150]
    page = Page(server)
    assert page.sum("vllm_radix:hit_tokens_total", where="inside") > 0
    for reason in ("unseen", "complete", "diverged"):
        assert page.sum("vllm_radix:lookups_total", reason=reason) > 0


def test_every_metric_that_has_a_meaning_here_is_shown(server):
    ask(server, [1, 2, 3])
    page = wait_for(server, lambda page: "vllm_radix:info" in page.families)
    shown = {
        name
        for name, family in page.families.items()
        if name.startswith("vllm_radix:") and family.samples
    }
    expected = {s.full_name for s in SERIES.values()} - {"vllm_radix:resume_points"}
    # Beside a counter the client shows when it was made.
    assert {name.removesuffix("_created") for name in shown} == expected
    (info,) = page.families["vllm_radix:info"].samples
    assert info.labels["manager"] == "RadixKVCacheManager"
    assert (info.value, info.labels["policy"], info.labels["engine"]) == (
        1,
        "prefix",
        "0",
    )


def test_a_scraper_changes_neither_answers_nor_steps(server):
    def steps(page):
        return page.sum("vllm:iteration_tokens_total_count")

    def run(salt):
        start = Page(server)
        answers = [ask(server, tokens, salt) for tokens in prompts("scraped")]
        asked = start.sum("vllm_radix:lookups_total") + len(answers)
        page = wait_for(
            server, lambda page: page.sum("vllm_radix:lookups_total") == asked
        )
        return answers, steps(page) - steps(start)

    alone = run("one")
    stop = threading.Event()

    def scrape():
        while not stop.is_set():
            httpx.get(f"{server}/metrics")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        scraped = run("two")
    finally:
        stop.set()
        thread.join()
    assert scraped == alone


def test_a_line_is_logged_beside_vllms(server, log):
    ask(server, prompts("line")[0])
    ask(server, prompts("line")[0])
    deadline = time.monotonic() + 30
    pattern = r"Radix: prefix cache hit rate: [\d.]+%, tokens saved: [1-9][\d,]* \("
    while not re.search(pattern, log.read_text()):
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.5)


def test_top_shows_the_server(server):
    command = [sys.executable, "-m", "vllm_radix.cli", "top", server, "--once"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["radix"]["policy"] == "prefix"
    assert seen["total"]["hit tokens"] == Page(server).sum(
        "vllm_radix:hit_tokens_total"
    )
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.timeout(1500)
def test_two_engines_behind_two_api_servers_are_counted_once(tiny, tmp_path):
    flags = ("--radix", "--data-parallel-size", "2", "--api-server-count", "2", *DUMMY)
    with serving(tiny, tmp_path / "log", *flags, seconds=900) as base:
        texts = [[number] * 40 + [1, 2, 3] for number in range(10, 22)]
        with ThreadPoolExecutor(6) as pool:
            cached = [count for _, count in pool.map(lambda t: ask(base, t), texts)]
            cached += [count for _, count in pool.map(lambda t: ask(base, t), texts)]
        queried = 2 * sum(map(len, texts))
        name = "vllm_radix:queried_tokens_total"
        wait_for(base, lambda page: page.sum(name) == queried)
        pages = [Page(base) for _ in range(12)]  # from either API server
        for page in pages:
            assert page.engines("vllm_radix:queried_tokens") == {"0", "1"}
            assert page.engines("vllm_radix:cached_blocks") == {"0", "1"}
            assert page.sum(name) == queried
            assert page.sum("vllm_radix:hit_tokens_total") == sum(cached)
            assert page.sum("vllm_radix:admissions_total") == len(cached)
            assert page.sum("vllm_radix:overtakes_count") == len(cached)
            for engine in ("0", "1"):
                ours = page.sum("vllm_radix:hit_tokens_total", engine=engine)
                assert ours == page.sum("vllm:prefix_cache_hits_total", engine=engine)
                assert page.sum(name, engine=engine) > 0
                assert page.sum("vllm_radix:pool_blocks", engine=engine) == 128
                assert page.sum("vllm_radix:info", engine=engine) == 1
