"""`replay --html`: the same page, of what a replay found."""

import json
import re

import pytest

from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.html.page import render_replay

NAME = "</script><b>tenant"
ARMS = ["stock", "radix", 'radix:{"policy": "fcfs"}', "apc-off"]


def lines(apart):
    for i in range(40):
        prompt = [*range(i % 3 * 1000, i % 3 * 1000 + 600), *range(9000 + i, 9020 + i)]
        yield {"token_ids": prompt, "output_length": 4, "arrival": i * apart,
               "tenant": [NAME, "b"][i % 2]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("replay")
    (made / "trace.jsonl").write_text("\n".join(map(json.dumps, lines(0.005))))
    return made


@pytest.fixture(scope="module")
def replayed(folder):
    words = ["replay", str(folder / "trace.jsonl"), "--blocks", "50", "400"]
    words += ["--max-num-seqs", "4", "--output", str(folder / "r.json")]
    words += ["--html", str(folder / "r.html"), "--arms", *ARMS]
    assert main(words) == ExitCode.GOOD
    return words


@pytest.fixture(scope="module")
def page(folder, replayed):
    return (folder / "r.html").read_text()


def test_the_page_holds_charts_of_every_cache_and_arm(page):
    names = re.findall(r"<svg[^>]*><title>(.*?)</title>", page)
    assert names == [
        "Prompt tokens computed", "Mean TTFT", "TTFT p99",  # maps
        "Prompt tokens computed", "Time to first token, mean",
        "Time to first token, p99", "Requests per second", "Mean against p99",
        "How to read the bars",
        "Time to first token: 50 blocks", "Hit rate over time: 50 blocks",
        "Time to first token: 400 blocks", "Hit rate over time: 400 blocks",
    ]  # fmt: skip
    for said in ("infinite cache (bound) · 50 blocks", "known in advance · 400 blocks"):
        assert said in page


def test_the_page_says_what_the_result_says(page, folder):
    result = json.loads((folder / "r.json").read_text())
    cell = result["cells"][0]
    stock, radix = (cell["arms"][arm] for arm in ARMS[:2])
    before, after = (arm["computed_prompt_tokens"] for arm in (stock, radix))
    assert f"({before:,} → {after:,};".replace(" →", "\u00a0→") in page
    assert f"{before / after:.2f}×" in page
    assert "Warning." in page and "waits grow as long as they come" in page


def test_names_of_tenants_stay_text(page):
    assert NAME not in page and "&lt;/script&gt;&lt;b&gt;tenant" in page


def test_hit_rates_end_at_the_hit_rate(folder, replayed):
    result = json.loads((folder / "r.json").read_text())
    for cell in result["cells"]:
        for name, pairs in cell["hit_rate_over_time"].items():
            times = [at for at, _ in pairs]
            assert len(pairs) == 40 and times == sorted(times)
            assert pairs[-1][1] == pytest.approx(cell["arms"][name]["hit_rate"])


def test_the_result_gives_the_page_again(page, folder):
    """But for the rows, which are made from it."""
    assert render_replay(json.loads((folder / "r.json").read_text())) == page


def test_without_stock_the_first_arm_is_compared_with(folder, replayed):
    result = json.loads((folder / "r.json").read_text())
    for cell in result["cells"]:
        for part in ("arms", "requests", "hit_rate_over_time"):
            del cell[part]["stock"], cell[part]["radix"]
    for used in result["machine"]["scheduler_cpu_seconds_per_request"]:
        del used["stock"], used["radix"]
    made = render_replay(result)
    assert "times better than radix:{&#34;policy&#34;: &#34;fcfs&#34;}" in made
    for cell in result["cells"]:
        for part in ("arms", "requests", "hit_rate_over_time"):
            del cell[part]["apc-off"]
    assert "Time to first token: 50 blocks" in render_replay(result)


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ("r.json", "--html: {path} is --output, too"),
        ("trace.jsonl", "--html: {path} is the trace, too"),
        ("r.csv", "--html: {path} is --csv, too"),
    ],
)
def test_the_page_replaces_nothing_else(folder, replayed, html, said, capsys):
    path = folder / html
    words = [*replayed, "--csv", str(folder / "r.csv"), "--html", str(path)]
    before = (folder / "trace.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert said.format(path=path) in capsys.readouterr().err
    assert (folder / "trace.jsonl").read_bytes() == before


def test_a_folder_is_no_page(folder, replayed, capsys):
    assert main([*replayed, "--html", str(folder)]) == ExitCode.OUTPUT
    assert f"--html: {folder} is a folder" in capsys.readouterr().err
