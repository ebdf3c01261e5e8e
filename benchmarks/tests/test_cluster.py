"""The simulation is held to closed forms, to the routing policy itself and to what was measured; the benchmarks run."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from benchmarks.cluster.simulation import (
    ALL_ROWS,
    H100_06B,
    ROUTINGS,
    Chooser,
    Load,
    Server,
    Simulation,
    breaking,
    newest,
    parts_of,
    validate,
)
from benchmarks.tests.runs import json_line, run_benchmark
from vecmill.core import routing
from vecmill.core.types import Lane

SEARCHES_ONLY = Load(connections=0, searches_per_second=0.5)
ONE_AT_A_TIME = Server(0.01, 1e-9, 16, search_seconds=0.0)
"""A pass holds one search and takes 10 ms."""


@pytest.mark.parametrize("kind", ROUTINGS)
def test_without_load_a_search_takes_its_service_time(kind: str) -> None:
    server = replace(H100_06B, search_seconds=0.004)
    found = Simulation(server, replace(SEARCHES_ONLY, searches_per_second=0.01), 3, kind).cold(5000.0)

    assert len(found.search_ms) > 50
    expected = 1e3 * (server.search_seconds + server.pass_seconds(SEARCHES_ONLY.search_tokens))
    assert found.percentile(50) == pytest.approx(expected)


@pytest.mark.parametrize("used", [0.3, 0.6, 0.8])
def test_one_replica_with_random_arrivals_is_an_m_d_1_queue(used: float) -> None:
    """The mean wait is r s / 2 (1 - r), by Pollaczek and Khinchine."""
    service = ONE_AT_A_TIME.pass_seconds(16)
    load = replace(SEARCHES_ONLY, searches_per_second=used / service)

    found = Simulation(ONE_AT_A_TIME, load, 1, "round-robin", seed=7).cold(400.0)

    mean = sum(found.search_ms) / len(found.search_ms) / 1e3
    assert mean == pytest.approx(service + used * service / (2 * (1 - used)), rel=0.08)
    # A share of the arrivals that depends on nothing leaves as many such queues.
    assert found.busy_seconds == pytest.approx(used * 400, rel=0.02)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_saturated_replicas_answer_what_full_passes_hold(kind: str) -> None:
    load = Load(searches_per_second=0, connections=8)
    texts = min(H100_06B.max_batch_tokens // load.tokens_per_text, ALL_ROWS)
    most = texts / H100_06B.pass_seconds(texts * load.tokens_per_text)

    found = Simulation(H100_06B, load, 4, kind).cold(5.0)

    assert 0.9 * 4 * most < found.texts_per_second <= 4 * most * 1.01


@pytest.mark.parametrize("kind", ROUTINGS)
def test_every_request_is_answered_once_and_a_seed_repeats_a_run(kind: str) -> None:
    def run() -> list[Any]:
        simulation = Simulation(H100_06B, Load(), 5, kind, seed=3)
        cold = simulation.cold(1.0)
        assert cold.sent == cold.answered > 100
        again = simulation.again(2.0)
        assert again.sent == again.answered > cold.sent
        assert simulation._chooser.bulk.sum() == simulation._chooser.interactive.sum() == 0
        return [cold.texts, cold.search_ms, again.hit_rate]

    assert run() == run()


def test_affinity_keeps_the_cache_warm_and_one_cache_for_all_needs_none() -> None:
    """A request finds its replica again with the chance that the policy says, or always where the cache is shared."""
    load = Load(connections=1, searches_per_second=0, unchanged=1.0, same_key=1.0)

    def hits(kind: str, **changes: Any) -> float:
        simulation = Simulation(H100_06B, replace(load, **changes), 8, kind)
        simulation.cold(2.0)
        return simulation.again(20.0).hit_rate or 0.0

    assert hits("round-robin", shared_cache=True) == 1
    assert hits("consistent-hash", connections=0.25) > 0.9
    assert hits("power-of-two") == pytest.approx(1 / 8, abs=0.05)
    assert hits("consistent-hash", connections=0.25, unchanged=0.5) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("replicas", [2, 3, 50])
def test_the_choices_are_those_of_the_routing_policy(replicas: int) -> None:
    random = Random(replicas)
    for kind in ("consistent-hash", "shortest-wait"):
        chooser = Chooser(H100_06B, replicas, kind, Random(0))
        for _ in range(200):
            spread = random.choice([1, 500, 100_000])
            chooser.interactive[:] = [random.randrange(spread) for _ in range(replicas)]
            chooser.bulk[:] = [random.randrange(spread) for _ in range(replicas)]
            chooser.answered[:] = [random.choice([-math.inf, 1 - 0.05 * random.random()]) for _ in range(replicas)]
            chooser.rest[:] = [0.02 * random.random() for _ in range(replicas)]
            lane = random.choice(list(Lane))
            work = routing.RoutedRequest(lane, random.randrange(1, 10_000), random.getrandbits(64))
            known = [chooser.replica(number, 1.0) for number in range(replicas)]
            policy = routing.choose if kind == "consistent-hash" else routing.shortest_wait

            expected = policy(known, work)

            assert expected is not None
            assert chooser.replica(chooser.choose(work, 1.0), 1.0).name == expected.name


def test_what_is_full_first_comes_first() -> None:
    seconds = {
        "redis_put_s": 9e-6, "redis_look_up_s": 3e-6, "proxy_bulk_s": 4e-4, "proxy_search_s": 2e-4,
        "tokenize_s_per_token": 2e-6,
    }  # fmt: skip
    rows = breaking(parts_of(seconds), H100_06B, Load(), 3700.0)

    full = [row["full_at_replicas"] for row in rows if row["full_at_replicas"]]
    assert full == sorted(full)
    assert full[0] == pytest.approx(1 / (3720 * 12e-6))
    assert all(math.isfinite(number) for number in full)


def test_the_simulation_is_within_a_tenth_of_what_was_measured() -> None:
    measured = newest("replicas")
    assert measured is not None

    rows = validate(measured)

    assert {row["replicas"] for row in rows} == {1, 2, 3}
    assert max(abs(row["off_percent"]) for row in rows) < 10


@pytest.mark.benchmark
def test_replicas_are_measured_against_one() -> None:
    done = run_benchmark(
        "cluster.replicas",
        *(
            "--models",
            "simulated",
            "--replicas",
            "2",
            "--rounds",
            "1",
            "--seconds",
            "1",
            "--texts",
            "64",
            "--batch",
            "8",
        ),
    )
    result = json_line(done)

    sides = result["simulated"]["routings"]
    assert sides.keys() == {"policy", "round-robin", "searches-to-one"}
    assert sides["policy"].keys() == {"1", "2"}
    for side in sides["policy"].values():
        assert side["errors"] == 0
        assert side["texts_per_s"]["min"] > 0
    assert sides["policy"]["1"]["efficiency_percent"]["median"] == 100
    assert "% of ideal" in done.stdout


@pytest.mark.benchmark
def test_the_parts_that_replicas_share_are_measured() -> None:
    result = json_line(run_benchmark("cluster.shared_parts", "--rounds", "5", "--requests", "20", "--texts", "20"))

    assert result["seconds"].keys() == {
        "redis_put_s", "redis_look_up_s", "proxy_bulk_s", "proxy_search_s", "tokenize_s_per_token"
    }  # fmt: skip


@pytest.mark.benchmark
def test_the_plan_has_a_row_for_each_routing() -> None:
    result = json_line(run_benchmark("cluster.simulation", "--replicas", "2"))

    assert [row["routing"] for row in result["plan"]] == list(ROUTINGS)
    assert all(row["texts_per_s"] > 0 for row in result["plan"])
