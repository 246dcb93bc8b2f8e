"""The files of examples/deployments are what their tools take, and fit each other."""

import json
import re
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


@pytest.fixture
def script(tmp_path):
    """Run the script with commands that print their words instead of serving."""
    for name, seconds in (("vllm", 20), ("vllm-router", 0.5)):
        double = tmp_path / name
        double.write_text(
            "#!/usr/bin/env bash\n"
            f"printf '%s\\n' \"$@\" > '{tmp_path}/{name}.words'\n"
            f"exec sleep {seconds}\n"
        )
        double.chmod(0o755)

    def run(*words, **env):
        env["PATH"] = f"{tmp_path}:/usr/bin:/bin"
        done = subprocess.run(
            [str(FOLDER / "data_parallel.sh"), *words],
            env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        said = {
            name: (tmp_path / f"{name}.words").read_text().splitlines()
            for name in ("vllm", "vllm-router")
            if (tmp_path / f"{name}.words").exists()
        }
        return done, said

    return run


def test_the_script_s_options_are_known(script, serve_parser):
    """Options shortened, or of a file, lose against its own."""
    words = ["--max-num-seqs", "7", "--block-si", "64", "--radix.patience", "2"]
    env = {"ENGINES": "3", "BLOCK_SIZE": "32", "POLICY": "kv_aware", "PORT": "8100"}
    done, said = script("MODEL", *words, **env)
    assert done.returncode == 0, done.stderr
    served = serve_parser.parse_args(said["vllm"][1:])
    assert (served.model_tag, served.max_num_seqs) == ("MODEL", 7)
    assert served.served_model_name == ["MODEL"] and served.host == "127.0.0.1"
    assert served.scheduler_cls.options == {"patience": 2}
    options = router_options(said["vllm-router"])
    assert served.enable_scale_out and options.policy == "kv_aware"
    assert options.intra_node_data_parallel_size == served.data_parallel_size == 3
    assert options.kv_event_block_size == served.block_size == 32
    assert served.port == 8100 and options.worker_urls == ["http://127.0.0.1:8100"]
    first = int(served.kv_events_config.endpoint.rpartition(":")[2])
    ends = ",".join(f"tcp://127.0.0.1:{first + rank}" for rank in range(3))
    assert options.kv_event_source == [f"http://127.0.0.1:8100={ends}"]
    assert options.kv_event_model == "MODEL"


def test_by_itself_the_script_evens_out_as_the_router_of_kubernetes(
    script, serve_parser
):
    done, said = script("MODEL")
    assert done.returncode == 0, done.stderr
    options = router_options(said["vllm-router"])
    other = router_options(container(ROUTER)["args"])
    assert options.policy == other.policy == "cache_aware"
    assert options.balance_abs_threshold == other.balance_abs_threshold == 8
    served = serve_parser.parse_args(said["vllm"][1:])
    assert served.enable_scale_out and served.kv_events_config is None
    # Events cost the engines what nobody would hear.
    assert options.kv_event_source == []


CONTRADICTS = "would contradict what the router is told; it is set by "


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["--block-size", "64"], {}, f"--block-size {CONTRADICTS}BLOCK_SIZE"),
        (["--block_size=64"], {}, f"--block_size=64 {CONTRADICTS}BLOCK_SIZE"),
        (["--port=1"], {}, f"--port=1 {CONTRADICTS}PORT"),
        (["-dp", "4"], {}, f"-dp {CONTRADICTS}ENGINES"),
        (["-dpl", "4"], {}, f"-dpl {CONTRADICTS}the script itself"),
        (
            ["--kv-events-config.topic", "x"],
            {},
            f"--kv-events-config.topic {CONTRADICTS}POLICY and EVENTS_PORT",
        ),
        (["--host", "::"], {}, f"--host {CONTRADICTS}the script itself"),
        (["--served-model-name", "x"], {}, f"{CONTRADICTS}the script itself"),
        ([], {"ENGINES": "0"}, "ENGINES is '0'; allowed: 1 to 65535"),
        ([], {"BLOCK_SIZE": "x"}, "BLOCK_SIZE is 'x'; allowed: 1 to 65535"),
        ([], {"PORT": "65536"}, "PORT is '65536'; allowed: 1 to 65535"),
        (
            [],
            {"POLICY": "random"},
            "POLICY is 'random'; allowed: cache_aware, kv_aware",
        ),
        ([], {"PORT": "30001"}, "two of the ports 30001 30000 30001 are the same"),
        (
            [],
            {"POLICY": "kv_aware", "EVENTS_PORT": "7999"},
            "two of the ports 8000 30000 30001 7999 8000 are the same",
        ),
    ],
)
def test_the_script_refuses_what_contradicts_the_router(script, words, env, message):
    done, said = script("MODEL", *words, **env)
    assert (done.returncode, said) == (2, {})
    assert done.stderr.startswith("data_parallel.sh: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
