"""The dashboard, the alerts and the compose file parse, and name what is there."""

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_radix.metrics.series import SERIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
LABELS = {"model_name", "engine", "le"}


def dashboard_queries():
    return [
        target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]


def rules():
    return [rule for group in RULES["groups"] for rule in group["rules"]]


QUERIES = [*dashboard_queries(), *(rule["expr"] for rule in rules())]


def parsed(query):
    """Return the query as Prometheus reads it, Grafana's variables filled in."""
    query = query.replace("$__rate_interval", "1m")
    return promql_parser.parse(re.sub(r"\$\w+", "x", query))


def names_in(query):
    """Return the metrics of a query."""
    parsed(query)
    found = re.findall(r"\b(?:vllm|vllm_radix|model_engine):\w+(?::\w+)?", query)
    return set(found)


@pytest.fixture(scope="module")
def stock_names(model_folder):
    """Names of all samples that vLLM's own logger shows."""
    args = EngineArgs(model=model_folder, skip_tokenizer_init=True)
    PrometheusStatLogger(args.create_engine_config(), [0])
    names = set()
    for family in REGISTRY.collect():
        if family.type == "histogram":
            names |= {family.name + end for end in ("_bucket", "_sum", "_count")}
        else:
            names.add(family.name + ("_total" if family.type == "counter" else ""))
    assert "vllm:prefix_cache_hits_total" in names
    return names


OURS = {name for series in SERIES.values() for name in series.sample_names}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_parses_and_names_metrics_that_exist(query, stock_names):
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    names = names_in(query)
    assert names
    assert names - stock_names - OURS - recorded == set()


@pytest.mark.parametrize("query", QUERIES)
def test_labels_and_their_values_exist(query):
    by_label = {series.label: series.values for series in SERIES.values()}
    values = {v for s in SERIES.values() for v in s.values}
    for label, value in re.findall(r'(\w+)=~?"([^"]*)"', query):
        assert label in LABELS | set(by_label)
        if not value.startswith("$"):
            assert set(value.split("|")) <= values
    for group in re.findall(r"(?:by|ignoring) \(([\w, ]+)\)", query):
        assert set(re.split(r", *", group)) <= LABELS | set(by_label)


def test_a_name_that_does_not_exist_is_seen(stock_names):
    wrong = names_in("rate(vllm_radix:hit_token_total[1m])")
    assert wrong - stock_names - OURS == {"vllm_radix:hit_token_total"}
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed("rate(vllm_radix:hit_tokens_total[1m]")


def test_every_metric_of_radixs_is_on_the_dashboard():
    shown = set().union(*map(names_in, dashboard_queries()))
    missing = [s.name for s in SERIES.values() if not shown & set(s.sample_names)]
    assert missing == []


def test_the_dashboard_is_one():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places and at["x"] + at["w"] <= 24, panel["title"]
        places |= cells
        if panel["type"] != "row":
            assert panel["targets"] and len(panel["description"]) > 10
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == variables


def test_alerts_say_what_they_mean():
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) == 5
    for alert in alerts:
        assert alert["for"] and alert["labels"]["severity"] in ("warning", "info")
        assert alert["annotations"].keys() == {"summary", "description"}


def test_files_mount_each_other():
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    services = compose["services"]
    mounts = {}
    for service in services.values():
        for mount in service.get("volumes", ()):
            source, target, _ = mount.split(":")
            assert (FOLDER / source).is_file(), source
            mounts[target] = source
    base = services["vllm"]["extends"]
    stock = yaml.safe_load((FOLDER / base["file"]).read_text())
    server = stock["services"][base["service"]]
    assert set(stock["volumes"]) == set(compose["volumes"])
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = scrape["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in services and f"{port}:{port}" in server["ports"]
    for rule_file in scrape["rule_files"]:
        assert f"/etc/prometheus/{rule_file}" in mounts
    (option,) = services["prometheus"]["command"]
    assert option.partition("=")[2] in mounts
    source = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())
    assert source["datasources"][0]["url"].startswith("http://prometheus:")
    provider = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    home = services["grafana"]["environment"]
    home = home["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounts and home.startswith(f"{folder}/")
