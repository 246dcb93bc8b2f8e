"""The recipes of docs/extending.md, followed to the letter.

Each file that the page names is written from its blocks, then run as a user would.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import tomllib
from vllm.plugins import load_plugins_by_group

from support.pages import BLOCKS, ROOT
from vllm_radix.config import RadixConfig, parse_flag
from vllm_radix.policy import ORDERS
from vllm_radix.tree import POLICIES
from vllm_radix_bench.replay import report
from vllm_radix_bench.traces import formats
from vllm_radix_bench.workloads.encoders import words


def files():
    """What the recipes tell to write, by name: blocks of one name are joined."""
    parts = defaultdict(list)
    for block in BLOCKS:
        if block.page.name == "extending.md" and block.title:
            parts[block.title].append(block.text)
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


FILES = files()
QA = FILES["qa.jsonl"]


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Write the files of the page where Python finds them; run one."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    orders, policies, modules = dict(ORDERS), dict(POLICIES), set(sys.modules)
    # What the recipes change is put back.
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    monkeypatch.setattr(report, "TIMES", report.TIMES)
    monkeypatch.setattr(report, "COLUMNS", report.COLUMNS)
    yield importlib.import_module
    for registry, known in ((ORDERS, orders), (POLICIES, policies)):
        registry.clear()
        registry.update(known)
    for name in set(sys.modules) - modules:
        if f"{name}.py" in FILES:
            del sys.modules[name]


def arms(path):
    return json.loads(path.read_text())["cells"][0]["arms"]


def test_the_order_of_the_recipe_is_used(follow, tmp_path):
    with pytest.raises(ValueError, match="'newest-first' is not one of"):
        RadixConfig(policy="newest-first")
    follow("compare_order")
    stock, radix, newest = arms(tmp_path / "order.json").values()
    # Each newcomer goes first: it overtakes more requests than the default lets it.
    assert newest["overtaken_most"] > radix["overtaken_most"]
    assert newest["requests_per_second"] > 0 and stock["overtaken_most"] == 0


def test_the_eviction_policy_of_the_recipe_is_used(follow, tmp_path, monkeypatch):
    module = follow("deepest_first")
    ranked = []
    rank = module.DeepestFirst.rank

    def counted(self, clock, depth):
        ranked.append(depth)
        return rank(self, clock, depth)

    monkeypatch.setattr(module.DeepestFirst, "rank", counted)
    follow("compare_eviction")
    lru, deepest = arms(tmp_path / "eviction.json").values()
    assert max(ranked) > 10
    assert deepest["computed_prompt_tokens"] != lru["computed_prompt_tokens"]


def test_the_eviction_policy_of_the_recipe_keeps_the_contract(follow, tmp_path):
    paths = [str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "test_deepest_first.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 4


def test_the_trace_format_of_the_recipe_is_read(follow, tmp_path):
    follow("replay_qa")
    result = json.loads((tmp_path / "qa.json").read_text())
    lengths = [len(words(json.loads(line)["question"])) for line in QA.splitlines()]
    assert arms(tmp_path / "qa.json")["stock"]["computed_prompt_tokens"] == sum(lengths)
    assert result["source"] == "qa.jsonl"


def test_the_column_of_the_recipe_is_shown_and_written(follow, tmp_path, capsys):
    follow("show_column")
    title = "TTFT mean / p50"
    assert title in capsys.readouterr().out
    assert title in (tmp_path / "column.csv").read_text().splitlines()[0]
    for row in json.loads((tmp_path / "column.json").read_text())["rows"]:
        assert row[title] > 0


def test_vllm_loads_an_order_by_its_entry_point(follow, tmp_path):
    package = tmp_path / "newest_first-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: newest-first\nVersion: 1\n")
    points = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]
    lines = [f"[{group}]" for group in points]
    lines += [f"{k} = {v}" for one in points.values() for k, v in one.items()]
    (package / "entry_points.txt").write_text("\n".join(lines))
    # What vLLM does in each of its processes.
    loaded = load_plugins_by_group("vllm.general_plugins")
    loaded["newest_first"]()
    assert parse_flag('{"policy": "newest-first"}')
