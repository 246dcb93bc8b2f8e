"""The recipes of docs/extending.md, followed to the letter.

Each file that the page names is written from its blocks, then run as a user would.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import tomllib
import torch
from bench.ab.test_servers_ab import stub_command
from prometheus_client import REGISTRY
from vllm.plugins import load_plugins_by_group
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from support.engine_double import WrongReadError
from support.hybrid_double import make_hybrid_scheduler
from support.pages import BLOCKS, ROOT
from support.prompts import prompt
from vllm_radix import RadixScheduler
from vllm_radix.config import RadixConfig, parse_flag
from vllm_radix.engine.groups import GROUP_TYPES
from vllm_radix.metrics.collector import RadixStatLogger, unregister
from vllm_radix.metrics.series import SERIES
from vllm_radix.metrics.wire import RadixStats
from vllm_radix.policy import ORDERS
from vllm_radix.tree import POLICIES
from vllm_radix.tree.resume import Chunk
from vllm_radix_bench.ab.loads import LOADS
from vllm_radix_bench.ab.servers import ServerSpec
from vllm_radix_bench.replay import report
from vllm_radix_bench.routing import ROUTINGS
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
    known = (ORDERS, POLICIES, GROUP_TYPES, SERIES, LOADS, ROUTINGS)
    registries = [(one, dict(one)) for one in known]
    modules = set(sys.modules)
    # What the recipes change is put back.
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)
    monkeypatch.setattr(report, "TIMES", report.TIMES)
    monkeypatch.setattr(report, "COLUMNS", report.COLUMNS)
    yield importlib.import_module
    for registry, known in registries:
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
    module = follow("once_first")
    labels = Counter()
    label = module.OnceFirst.label

    def counted(self, uses, output_tokens, new_tokens):
        labels[uses > 1, output_tokens > 0, new_tokens > 0] += 1
        return label(self, uses, output_tokens, new_tokens)

    monkeypatch.setattr(module.OnceFirst, "label", counted)
    follow("compare_eviction")
    default, once = arms(tmp_path / "eviction.json").values()
    # Requests say what they generated, and how much of them was new.
    assert labels[True, True, True] > 10 and labels[False, True, True] > 10
    assert once["computed_prompt_tokens"] != default["computed_prompt_tokens"]


@pytest.mark.parametrize("name", ["test_once_first.py", "test_two_choices.py"])
def test_what_the_recipe_adds_keeps_the_contract(name, follow, tmp_path):
    paths = [str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 4


def test_the_routing_rule_of_the_recipe_is_compared(follow, tmp_path):
    module = follow("two_choices")
    follow("compare_routing")
    turn, drawn = json.loads((tmp_path / "routing.json").read_text())["cells"]
    assert drawn["routing"] == f'{module.TwoChoices.name}:{{"drawn": 3}}'
    for cell in (turn, drawn):
        for arm in cell["arms"].values():
            counts = [one["requests"] for one in arm["engines"]]
            assert len(counts) == 4 and min(counts) > 0
    assert drawn["requests"] != turn["requests"]


BLOCK, CHUNK = 16, 64
SIZES = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def serve_chunks(follow, block_size=BLOCK):
    """Serve requests that part at several places; return the engine."""
    register_all_kvcache_specs(None)  # as an engine does
    sizes = {**SIZES, "block_size": block_size}
    reads, spec = follow("check_two_chunks"), follow("two_chunks").TwoChunksSpec
    layout = [FullAttentionSpec(**sizes), spec(**sizes, attention_chunk_size=CHUNK)]
    engine = reads.Reads(make_hybrid_scheduler(RadixScheduler, layout, 80))
    shared = prompt("shared", 230)
    for number, cut in enumerate((230, 230, 220, 150, 150)):
        engine.add(f"{number}", shared[:cut] + prompt(number, 40))
        engine.run()
    return engine


def test_the_group_type_of_the_recipe_is_served(follow):
    engine = serve_chunks(follow)
    # The second that parts at a place leaves a point there, and two chunks before it
    # are kept: others go on there, or a little before.
    assert [engine.cached[name] for name in "01234"] == [0, 0, 220, 0, 150]
    engine.scheduler.kv_cache_manager.block_pool.check()


def test_the_group_type_is_unknown_before_and_says_what_it_cannot(follow, monkeypatch):
    with pytest.raises(ValueError, match="chunks that do not begin with a block"):
        serve_chunks(follow, block_size=48)
    monkeypatch.delitem(GROUP_TYPES, follow("two_chunks").TwoChunksManager)
    with pytest.raises(ValueError, match="TwoChunksSpec x 1 layers"):
        serve_chunks(follow)


def test_a_component_that_keeps_too_little_is_seen(follow, monkeypatch):
    group = follow("two_chunks").TwoChunksGroup
    one_chunk = classmethod(lambda cls, manager: Chunk(BLOCK, chunk=CHUNK))
    monkeypatch.setattr(group, "component", one_chunk)
    with pytest.raises(WrongReadError, match="of group 1 in block 0"):
        serve_chunks(follow)


def test_the_metric_of_the_recipe_is_sent_and_shown(follow, capsys):
    follow("show_metric")
    assert "namespaces: [2]" in capsys.readouterr().out
    model = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
    logger = RadixStatLogger(model, [0])
    stats = SimpleNamespace(radix=RadixStats(gauges={"namespaces": [2]}))
    logger.record(stats, None)
    labels = {"model_name": "m", "engine": "0"}
    assert REGISTRY.get_sample_value("vllm_radix:namespaces", labels) == 2
    unregister()


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


def test_the_load_of_the_recipe_is_sent(follow, tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.delenv("STUB_FAULT", raising=False)
    monkeypatch.setattr(ServerSpec, "command", stub_command)
    (tmp_path / "MODEL").symlink_to(tiny)
    follow("send_same_prompt")
    sent = json.loads((tmp_path / "same.json").read_text())["workloads"][0]
    assert (sent["name"], sent["load"]) == ("same-prompt", "same-prompt")
    assert sent["requests"] == sent["answers"]["compared"] == 20
    assert sent["counts"]["radix"]["prompt_tokens"] == 20 * 300
    main = sys.modules["send_same_prompt"].main
    with pytest.raises(SystemExit) as stop:
        main(["ab", "MODEL", "--load", "same-prompt", "--", "many"])
    assert stop.value.code == 2
    assert "--load same-prompt: give one number" in capsys.readouterr().err


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
