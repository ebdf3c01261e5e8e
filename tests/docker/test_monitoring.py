"""Every metric and label that the dashboard, the alerts and the autoscaler ask for is one that the server has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any
from urllib.parse import urlsplit

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import serving
from tests.docker.parts import DOCKER, K8S, manifests, of_kind
from vecmill.core.errors import GenerationTimeout, VecmillError
from vecmill.http.errors import OF_LOAD
from vecmill.telemetry.metrics import Metrics

Seen = dict[str, dict[str, set[str]]]

MONITORING = DOCKER / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "vecmill.json").read_text("utf-8"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text("utf-8"))
ADAPTER = yaml.safe_load((K8S / "prometheus-adapter-values.yaml").read_text("utf-8"))
PROMETHEUS = yaml.safe_load((MONITORING / "prometheus.yaml").read_text("utf-8"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))

SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
# What Prometheus adds to every sample, and a metric of its own.
ADDED = {"instance", "job", "namespace", "pod"}
OWN = {"up"}
# What the requests below give no sample of: there is no GPU, and some kernels know no pressure.
UNSEEN = {"vecmill_memory_pressure_ratio"}


def _panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def _of_dashboard() -> dict[str, str]:
    return {f"{panel['title']} {target['refId']}": target["expr"] for panel in _panels() for target in panel["targets"]}


def _of_alerts() -> dict[str, str]:
    return {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}


def _of_adapter() -> dict[str, str]:
    (rule,) = ADAPTER["rules"]["custom"]
    query = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["as"])
    query = query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="vecmill",pod=~"a|b"')
    return {"series": rule["seriesQuery"], "query": query}


def _of_keda() -> dict[str, str]:
    triggers = of_kind(manifests("overlays/replicas-keda"), "ScaledObject")["vecmill"]["spec"]["triggers"]
    return {f"KEDA {trigger['name']}": trigger["metadata"]["query"] for trigger in triggers}


QUERIES = {**_of_dashboard(), **_of_alerts(), **_of_adapter(), **_of_keda()}


def _parsed(query: str) -> promql_parser.Expr:
    """Raises ValueError where it is no PromQL."""
    return promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$instance", "a|b"))


def _parts(query: str) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(_parsed(query), lambda part: found.append(part))
    return found


def _selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    for part in _parts(query):
        if isinstance(part, promql_parser.MatrixSelector):
            yield part.vector_selector
        elif isinstance(part, promql_parser.VectorSelector):
            yield part


def _grouped_by(query: str) -> set[str]:
    parts = [part for part in _parts(query) if isinstance(part, promql_parser.AggregateExpr)]
    return {label for part in parts if part.modifier for label in part.modifier.labels}


@pytest.fixture(scope="module")
def declared() -> dict[str, list[str]]:
    """Each metric, with the names of the samples that it can give."""
    families = Metrics().families()
    return {family.name: [family.name + suffix for suffix in SUFFIXES[family.type]] for family in families}


@pytest.fixture(scope="module")
async def seen() -> Seen:
    """The samples of a server that has done some work: of each name the labels, and of each label the values."""
    async with serving(replica="one") as client:
        await _work(client)
        # What Prometheus shows where nobody set a key; a server without keys does not mind.
        key = (MONITORING / "no-key").read_text("utf-8").strip()
        answer = await client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    found: Seen = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                of_name.setdefault(label, set()).add(value)
    return found


async def _work(client: httpx.AsyncClient) -> None:
    """A search and bulk, each twice, so that some come from the cache; a refusal; a job."""
    for priority in ("interactive", "interactive", "bulk", "bulk"):
        body = {"input": [priority, "long " * 600], "priority": priority}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
    assert (await client.post("/v1/embeddings", json={"input": []})).status_code == 400
    answer = await client.post("/jobs", json={"project": "p", "total_chunks": 1, "instance_id": "i"})
    assert answer.status_code == 200


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_asks_for_metrics_that_there_are(name: str, declared: dict[str, list[str]]) -> None:
    asked = {selector.name for selector in _selectors(QUERIES[name])}
    assert asked
    assert asked <= {sample for samples in declared.values() for sample in samples} | OWN


def test_every_metric_is_asked_for(declared: dict[str, list[str]]) -> None:
    asked = {selector.name for query in QUERIES.values() for selector in _selectors(query)}
    own = {metric: samples for metric, samples in declared.items() if metric.startswith("vecmill_")}
    assert [metric for metric, samples in own.items() if not asked & set(samples)] == []


def test_only_what_this_machine_lacks_is_not_seen(seen: Seen) -> None:
    asked = {str(selector.name) for query in QUERIES.values() for selector in _selectors(query)}
    assert {name for name in asked - seen.keys() if not name.startswith("vecmill_gpu_")} <= OWN | UNSEEN


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_asks_for_labels_that_there_are(name: str, seen: Seen) -> None:
    selectors = [(selector, seen.get(str(selector.name), {})) for selector in _selectors(QUERIES[name])]
    known = {label for _, labels in selectors for label in labels} | ADDED
    if all(labels for _, labels in selectors):
        assert _grouped_by(QUERIES[name]) <= known
    for selector, labels in selectors:
        for matcher in selector.matchers.matchers if labels else ():
            assert matcher.name in known
            if matcher.op == promql_parser.MatchOp.Equal and matcher.name in ("lane", "outcome", "kind"):
                assert matcher.value in labels[matcher.name]


def test_the_dashboard_reads_the_source_that_is_provisioned() -> None:
    sources = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text("utf-8"))
    (source,) = sources["datasources"]
    for panel in _panels():
        assert panel["datasource"]["uid"] == source["uid"]
        assert all(target["datasource"]["uid"] == source["uid"] for target in panel["targets"])
    url = urlsplit(source["url"])
    (port,) = COMPOSE["services"][str(url.hostname)]["ports"]
    assert port.rpartition(":")[2] == str(url.port)


def test_panels_have_an_id_each_and_a_place_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_grafana_finds_the_dashboard() -> None:
    providers = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/vecmill.yaml").read_text("utf-8"))
    (provider,) = providers["providers"]
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    assert mounts[provider["options"]["path"]] == "./monitoring/grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./monitoring/grafana/provisioning"
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == (
        f"{provider['options']['path']}/vecmill.json"
    )


def test_prometheus_finds_the_server_its_alerts_and_its_key() -> None:
    (scrape,) = PROMETHEUS["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert COMPOSE["services"][name]["environment"]["PORT"] == port
    prometheus = COMPOSE["services"]["prometheus"]
    mounted = [volume.split(":")[1] for volume in prometheus["volumes"]]
    assert PROMETHEUS["rule_files"] == ["/etc/prometheus/alerts.yaml"]
    assert "/etc/prometheus/alerts.yaml" in mounted
    assert scrape["authorization"]["credentials_file"] in [f"/run/secrets/{name}" for name in prometheus["secrets"]]


def test_alerts_say_what_is_wrong_and_what_to_look_at() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["description"], rule["alert"]
        assert not (grouped := _grouped_by(rule["expr"])) or "instance" in grouped, rule["alert"]
    assert {rule["expr"] for rule in rules if rule["alert"] == "VecmillDown"} == {
        f'up{{job="{PROMETHEUS["scrape_configs"][0]["job_name"]}"}} == 0'
    }


def _kinds(error: type[VecmillError]) -> Iterator[str]:
    yield error.__name__
    for kind in error.__subclasses__():
        yield from _kinds(kind)


@pytest.mark.parametrize("name", ["VecmillErrors", "Errors of the server A"])
def test_errors_of_the_server_are_those_that_stats_has(name: str) -> None:
    """And a server that answers nothing else has no series of what went well: the sum is not empty for that."""
    own, *others = (selector.matchers.matchers for selector in _selectors(QUERIES[name]))
    (refused,) = (matcher.value for matcher in own if matcher.name == "error")
    of_load = {kind for error in OF_LOAD for kind in _kinds(error)} - set(_kinds(GenerationTimeout))
    assert set(refused.split("|")) == of_load
    parts = _parts(QUERIES[name])
    (total,) = (part for part in parts if isinstance(part, promql_parser.BinaryExpr) and str(part.op) == "+")
    assert others
    assert " or " in str(total.lhs) or " or " in str(total.rhs)


def test_a_cluster_has_the_same_alerts() -> None:
    rule = of_kind(manifests("overlays/replicas"), "PrometheusRule")["vecmill"]
    assert rule["spec"]["groups"] == ALERTS["groups"]


def test_the_autoscaler_asks_for_what_the_adapter_gives() -> None:
    (metric,) = of_kind(manifests("overlays/replicas"), "HorizontalPodAutoscaler")["vecmill"]["spec"]["metrics"]
    (rule,) = ADAPTER["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == "vecmill_queued_tokens"
