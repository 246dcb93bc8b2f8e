"""The files of examples/deployments are what their tools take, and fit each other."""

import json
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from vllm.config.kv_events import KVEventsConfig
from vllm_router.router_args import RouterArgs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deployments"
KUBERNETES = FOLDER / "kubernetes"
FILES = sorted(KUBERNETES.glob("*.yaml"))
SCHEMAS = "1.34"
# The operator's own schema is in no registry of packages; what is used of it.
POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": {"required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"required": ["matchLabels"]},
                "podMetricsEndpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["port"],
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string", "pattern": "^/"},
                            "interval": {"type": "string", "pattern": "^[0-9]+s$"},
                        },
                    },
                },
            },
        },
    },
}


def documents(path):
    return [*yaml.safe_load_all(path.read_text())]


ALL = [document for path in FILES for document in documents(path)]


def one(kind, name):
    (found,) = (d for d in ALL if (d["kind"], d["metadata"]["name"]) == (kind, name))
    return found


def container(workload):
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return found


def ports(workload):
    return {p["name"]: p["containerPort"] for p in container(workload)["ports"]}


SERVERS = one("StatefulSet", "vllm-radix")
ROUTER = one("Deployment", "vllm-router")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kubernetes_knows_each_field(path):
    for document in documents(path):
        if document["kind"] == "PodMonitor":
            jsonschema.validate(document, POD_MONITOR)
        else:
            kubernetes_validate.validate(document, SCHEMAS, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_seen():
    broken = json.loads(json.dumps(SERVERS))
    container(broken)["argz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, SCHEMAS, strict=True)


@pytest.mark.parametrize("workload", [SERVERS, ROUTER], ids=["servers", "router"])
def test_selectors_ports_and_probes_meet(workload):
    name = workload["metadata"]["name"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    known, service = ports(workload), one("Service", name)
    assert workload["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    for port in service["spec"]["ports"]:
        assert port["port"] == known[port["name"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container(workload):
            asked = container(workload)[probe]["httpGet"]
            assert asked["port"] in known and asked["path"] == "/health"
    monitor = one("PodMonitor", name)["spec"]
    assert monitor["selector"]["matchLabels"] == labels
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in known
    mounts = {m["name"] for m in container(workload).get("volumeMounts", ())}
    spec = workload["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    claims = workload["spec"].get("volumeClaimTemplates", ())
    assert mounts == volumes | {claim["metadata"]["name"] for claim in claims}


def router_options(words):
    """Return what vllm-router makes of its words."""
    import argparse

    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return RouterArgs.from_cli_args(parser.parse_args(words), use_router_prefix=False)


@pytest.fixture
def served(serve_parser):
    """The options of the servers, as vLLM reads them."""
    args = serve_parser.parse_args(container(SERVERS)["args"])
    assert args.scheduler_cls.options == {}
    return args


def urls_of_servers(port):
    name, service = SERVERS["metadata"]["name"], SERVERS["spec"]["serviceName"]
    numbers = range(SERVERS["spec"]["replicas"])
    return [f"http://{name}-{number}.{service}:{port}" for number in numbers]


def test_the_router_sends_to_each_server(served):
    options = router_options(container(ROUTER)["args"])
    assert served.enable_scale_out and served.port == ports(SERVERS)["http"]
    assert options.worker_urls == urls_of_servers(served.port)
    assert options.port == ports(ROUTER)["http"]
    assert options.prometheus_port == ports(ROUTER)["metrics"]
    assert options.policy == "cache_aware"


def test_the_other_policy_hears_each_server(served):
    """The lines that are comments, in place of those of the policy."""
    text = (KUBERNETES / "router.yaml").read_text()
    commented = re.findall(r"^ *# - (--.*)$", text, re.MULTILINE)
    words = [w for w in container(ROUTER)["args"] if not w.startswith("--policy")]
    options = router_options([*words, *commented])
    events = served.kv_events_config
    assert isinstance(events, KVEventsConfig) and events.topic == ""
    port = ports(SERVERS)["kv-events"]
    assert events.endpoint == f"tcp://*:{port}"
    assert options.policy == "kv_aware"
    assert options.kv_event_block_size == served.block_size
    assert options.kv_event_model == served.model_tag
    sources = [
        f"{url}={url.replace('http', 'tcp').rpartition(':')[0]}:{port}"
        for url in urls_of_servers(served.port)
    ]
    assert [*options.kv_event_source] == sources


def test_the_images_are_of_the_versions_that_are_tested():
    router = (KUBERNETES / "router.Dockerfile").read_text()
    installed = version("vllm-router")
    assert f"vllm-router=={installed}" in router
    assert container(ROUTER)["image"] == f"vllm-router:{installed}"
    script = (FOLDER / "data_parallel.sh").read_text()
    assert f"vllm-router=={installed}" in script
    assert (
        container(SERVERS)["image"] == f"vllm-radix:{version('vllm').partition('+')[0]}"
    )


def test_the_script_s_options_are_known(tmp_path, serve_parser):
    """Run with commands that print their words instead of serving."""
    for name in ("vllm", "vllm-router"):
        double = tmp_path / name
        double.write_text(
            "#!/usr/bin/env python3\n"
            "import pathlib, shlex, sys, time\n"
            f"pathlib.Path({str(tmp_path)!r}, {name!r} + '.words').write_text("
            "shlex.join(sys.argv[1:]))\n"
            f"time.sleep({5 if name == 'vllm' else 1})\n"
        )
        double.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ENGINES": "3", "BLOCK_SIZE": "32"}
    command = [str(FOLDER / "data_parallel.sh"), "MODEL", "--max-num-seqs", "7"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = {
        name: shlex.split((tmp_path / f"{name}.words").read_text())
        for name in ("vllm", "vllm-router")
    }
    served = serve_parser.parse_args(said["vllm"][1:])
    assert (served.model_tag, served.max_num_seqs) == ("MODEL", 7)
    assert served.scheduler_cls.options == {} and served.enable_scale_out
    options = router_options(said["vllm-router"])
    assert options.intra_node_data_parallel_size == served.data_parallel_size == 3
    assert options.kv_event_block_size == served.block_size == 32
    first = int(served.kv_events_config.endpoint.rpartition(":")[2])
    ends = ",".join(f"tcp://127.0.0.1:{first + rank}" for rank in range(3))
    assert options.kv_event_source == [f"http://127.0.0.1:8000={ends}"]
