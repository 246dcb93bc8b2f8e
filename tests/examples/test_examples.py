"""Each example is run as its first lines say."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from vllm.benchmarks.sweep.param_sweep import ParameterSweep

from support.servers import free_port, serving
from vllm_radix.policy import ORDERS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(command, tmp_path, **env):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**ENV, **env},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def example(name, tmp_path, *words):
    return run([sys.executable, EXAMPLES / name, *words], tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_says_what_it_shows_and_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    shows, _, how = text.partition("\n\n")
    assert "\n" not in shows
    assert how.startswith("Run: ") and f"examples/{path.name}" in how


def test_every_example_is_on_the_first_page_of_the_docs():
    page = (ROOT / "docs" / "index.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.name != "trace.jsonl"]
    assert [n for n in names if f"../examples/{n})" not in page and n[0] != "_"] == []


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run an example in this process, as ``python examples/NAME`` would."""
    monkeypatch.chdir(tmp_path)
    orders = dict(ORDERS)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    ORDERS.clear()
    ORDERS.update(orders)


def test_the_tree_by_itself(here):
    assert "evicted: [1]\ncached blocks: (0,)\n" in here("tree_by_itself.py")


def test_a_trace_is_replayed(here):
    printed = here("replay_your_trace.py")
    stock, radix = re.search(r"computed: ([\d,]+) → ([\d,]+)\.", printed).groups()
    assert int(radix.replace(",", "")) < int(stock.replace(",", ""))


def test_an_order_is_registered_and_compared(here):
    printed = here("order_of_your_own.py")
    tokens = re.findall(r"^(stock|radix.*): ([\d,]+) tokens", printed, re.M)
    assert [name for name, _ in tokens][:2] == ["stock", "radix"]
    assert len({computed for _, computed in tokens}) == 3


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_few_shot_offline_finds_more_than_stock(smollm2, tmp_path):
    def cached(*flags):
        printed = example("few_shot_offline.py", tmp_path, smollm2, *flags)
        return int(re.search(r"32 answers; (\d+) of \d+ prompt", printed)[1])

    assert cached() > 1.2 * cached("--stock")


SWEEP = EXAMPLES / "sweep"


def test_the_sweep_names_servers_that_vllm_knows(serve_parser):
    arms = ParameterSweep.read_json(SWEEP / "serve.json")
    parsed = [serve_parser.parse_args(arm.apply_to_cmd(["MODEL"])) for arm in arms]
    options = [getattr(one.scheduler_cls, "options", None) for one in parsed]
    assert options == [None, {}, {"patience": 1.5}]


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.timeout(900)
def test_the_sweep_measures_both_arms(tiny, tmp_path):
    two = {"stock": {}, "radix": {"radix": True}}
    (tmp_path / "two.json").write_text(json.dumps(two))
    options = "--load-format dummy --dtype float32 --enforce-eager --block-size 32 "
    options += "--max-model-len 2048 --max-num-seqs 4 --num-gpu-blocks-override 129"
    env = {
        "SERVE_OPTIONS": options,
        "SERVE_PARAMS": str(tmp_path / "two.json"),
        "PROMPTS": "20",
        "RUNS": "1",
        "PORT": str(free_port()),
        "OUTPUT": str(tmp_path / "out"),
    }
    run([SWEEP / "run.sh", tiny], tmp_path, **env, **on_path())
    results = [p for p in (tmp_path / "out").rglob("*.json") if "run=" in p.name]
    measured = [json.loads(path.read_text()) for path in results]
    assert len(measured) == 2 and all(one["completed"] == 20 for one in measured)


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """One server for all clients; tenants are told apart by their salt."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--radix.tenant", "cache_salt", "--enable-prompt-tokens-details"]
    with serving(tiny, log, *flags, "--load-format", "dummy") as base:
        yield f"{base}/v1"


def cached_of(printed, name):
    found = re.findall(rf"^{name}: (\d+) of \d+ prompt tokens", printed, re.M)
    return [int(number) for number in found]


@pytest.mark.serve
@pytest.mark.timeout(900)
def test_tenants_chat(server, tmp_path):
    printed = example("chat_with_tenants.py", tmp_path, server)
    for tenant in ("one", "two"):
        first, second, third = cached_of(printed, tenant)
        assert first == 0, "the other tenant's cache was seen"
        assert third > second > 0


@pytest.mark.serve
@pytest.mark.timeout(900)
def test_agents_branch(server, tmp_path):
    printed = example("branching_agents.py", tmp_path, server)
    (plan,) = cached_of(printed, "plan")
    branches = cached_of(printed, r"branch \d")
    steps = cached_of(printed, r"branch \d\.\d")
    assert plan == 0 and len(branches) == 3 and len(steps) == 6
    assert min(branches) > 0 and min(steps) > max(branches)


@pytest.mark.serve
@pytest.mark.timeout(900)
def test_an_agent_gives_hints_and_a_wrong_one_is_refused(server, tmp_path):
    printed = example("agent_loop_with_hints.py", tmp_path, server)
    first, *others, last = cached_of(printed, r"(?:before \w+|last)")
    assert first == 0 and 0 < others[0] < others[1] < last
    (refused,) = re.findall(r"^refused: (.*)$", printed, re.MULTILINE)
    assert refused.startswith("radix_expect_in: 'soon' is not a number of seconds")


def on_path():
    """`vllm` stands beside the Python that runs the tests."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


DOCKER = EXAMPLES / "docker"


def test_the_image_is_of_the_vllm_that_is_supported():
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    steps = {line[0]: line[1:] for line in words if line}
    image, _, tag = steps["FROM"][0].partition(":")
    assert image == "vllm/vllm-openai"
    (wanted,) = (
        one
        for line in requires("vllm-radix")
        if (one := Requirement(line)).name == "vllm"
    )
    assert wanted.specifier.contains(tag.removeprefix("v"))
    source, target = steps["COPY"]
    assert source == "." and steps["RUN"][-1] == target
    assert "install" in steps["RUN"]


def test_the_compose_file_builds_that_image_and_serves_with_radix():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    service = compose["services"]["vllm"]
    context = (DOCKER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert "--radix" in service["command"]
    volumes = [volume.partition(":")[0] for volume in service["volumes"]]
    assert set(volumes) == set(compose["volumes"])
    ports = [port.partition(":")[2] for port in service["ports"]]
    assert any(
        f":{port}/health" in service["healthcheck"]["test"][-1] for port in ports
    )


def test_the_image_s_server_takes_the_command(serve_parser):
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    parsed = serve_parser.parse_args(compose["services"]["vllm"]["command"])
    assert parsed.model_tag.startswith("${MODEL")
    assert parsed.enable_prompt_tokens_details
