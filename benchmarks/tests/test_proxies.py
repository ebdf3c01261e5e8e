"""The benchmark of the proxies, tiny, and the simulation of how long a new replica takes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.cluster.reaction_time import (
    CASES,
    Assumptions,
    markdown,
    shortest_and_longest,
    simulate,
    table,
)
from benchmarks.tests.runs import json_line, run_benchmark

ROOT = Path(__file__).parents[2]
K8S = ROOT / "docker" / "k8s"


@pytest.mark.benchmark
def test_the_overhead_of_each_proxy_is_what_it_adds_to_the_direct_way() -> None:
    options = ("--sizes", "10000,1000000", "--connections", "1,4", "--requests", "20", "--rounds", "1")
    result = json_line(run_benchmark("cluster.proxy_overhead", *options))
    assert {"host", "programs", "settings", "other_cores"} <= result.keys()
    assert result["programs"]["haproxy"].startswith("HAProxy version")
    assert len(result["cases"]) == 4
    for case in result["cases"].values():
        assert case["ms"].keys() == {"direct", "haproxy", "nginx"}
        for side in case["ms"].values():
            assert 0 < side["p50"]["median"] <= side["p99"]["median"]
        for kind, added in case["added_ms"].items():
            through = case["ms"][kind]["p50"]["median"] - case["ms"]["direct"]["p50"]["median"]
            assert added["p50"]["median"] == pytest.approx(through, rel=1e-2, abs=1e-2)


@pytest.mark.benchmark
def test_one_port_is_compared_with_the_servers_own_addresses() -> None:
    options = ("--ways", "direct,haproxy", "--rounds", "1", "--seconds", "1", "--texts", "64", "--batch", "8")
    result = json_line(run_benchmark("cluster.one_port", *options))
    assert result["ways"].keys() == {"direct", "haproxy"}
    for way in result["ways"].values():
        assert way["errors"] == 0
        assert way["texts_per_s"]["min"] > 0
    assert result["ways"]["direct"]["slower_percent"]["median"] == 0


def test_what_is_assumed_of_the_manifests_is_in_them() -> None:
    assumed = Assumptions()
    scaled = yaml.safe_load((K8S / "components/keda/scaled-object.yaml").read_text("utf-8"))
    up = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleUp"]
    assert up["stabilizationWindowSeconds"] == assumed.window
    monitor = yaml.safe_load((K8S / "components/prometheus-operator/service-monitor.yaml").read_text("utf-8"))
    assert monitor["spec"]["endpoints"][0]["interval"] == f"{assumed.scrape_every:g}s"
    server = yaml.safe_load((K8S / "base/stateful-set.yaml").read_text("utf-8"))
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["periodSeconds"] == assumed.probe_every


@pytest.mark.parametrize("name", CASES)
def test_no_reaction_is_shorter_or_longer_than_its_parts_allow(name: str) -> None:
    shortest, longest = shortest_and_longest(CASES[name])
    draw = random.Random(1)
    totals = [simulate(CASES[name], draw).total for _ in range(500)]
    assert shortest <= min(totals)
    assert max(totals) <= longest
    assert max(totals) - min(totals) > 10


def test_the_simulation_is_what_can_be_worked_out_by_hand() -> None:
    """Nothing left to chance: scraped and synced at once, each pair of one value."""
    exact = Assumptions(
        scrape_every=1e-9, query=(0, 0), schedule=(1, 1), volumes=(2, 2), start=(4, 4), load=(8, 8), warm_up=(16, 16),
        probe_every=1e-9, endpoints=(32, 32), sync_every=10, window=0,
    )  # fmt: skip
    draw = random.Random(3)
    assert simulate(exact, draw).total == pytest.approx(63, abs=10)
    assert simulate(exact, draw).seen <= 10
    # The last low value is of the sync before; it leaves a window of 60 s with the seventh sync after it.
    assert simulate(replace(exact, window=60), draw).decided == pytest.approx(60)
    assert simulate(replace(exact, window=65), draw).decided == pytest.approx(60)
    # 5 GB at 1 Gbit/s and 8 s of unpacking each; 16 GB of models.
    assert simulate(replace(exact, image_gb=5), draw).placed == 3 + 5 * (8 + 8)
    assert simulate(replace(exact, models_gb=16, network_gbit=10), draw).loaded == pytest.approx(28 + 12.8)


def test_the_page_shows_what_the_simulation_gives() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    assert table(200, 1) == table(200, 1)
    for row in markdown():
        assert row in page
