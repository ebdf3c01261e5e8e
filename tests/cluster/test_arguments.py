"""What `serve run vecmill.cluster:build` makes of its arguments, what it refuses, and what it sees in a request."""

from __future__ import annotations

import gzip
import json
from math import isfinite
from time import monotonic, sleep
from typing import Any

import click
import pytest
import yaml
from starlette.datastructures import Headers

pytest.importorskip("ray", reason="needs the extra `ray`; `make test-ray` installs it")

from ray.serve.config import AutoscalingContext, RequestRouterConfig

from vecmill.cluster import application, build, routes
from vecmill.cluster.front import Front, PlacementNames, look_at
from vecmill.cluster.routes import Route, Sent
from vecmill.cluster.scaling import QueuedTokens
from vecmill.config import load_settings
from vecmill.core.routing import RoutedRequest
from vecmill.core.types import Lane, Task


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("RERANK_MODEL", "none")


TWO = [{"name": "a"}, {"name": "a"}]


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ({"replica": 2}, {}, "replica: is no argument; there are name,"),
        ({"replicas": 0}, {}, "replicas: Input should be greater than or equal to 1"),
        ({"min_replicas": 3, "max_replicas": 2}, {}, "min_replicas=3 is above max_replicas=2"),
        ({"min_replicas": 3}, {}, "min_replicas and max_replicas go together"),
        ({"num_gpus": 2}, {}, "num_gpus: Input should be less than or equal to 1"),
        ({"num_gpus": 0.5}, {"DEVICE": "cuda"}, "set MEMORY_FRACTION to 0.5 or less"),
        ({"num_gpus": 0}, {"DEVICE": "cuda"}, "lets the placement `models` see no card: set num_gpus=1"),
        ({}, {"DEVICE": "cuda:1"}, "Ray gives each replica its own: set DEVICE=cuda"),
        ({}, {"DEVICE": "cuda:0,cuda:1"}, "`serve run vecmill.cluster:build replicas=N`"),
        ({"settings": {"EMBED": "x"}}, {}, "EMBED, in the settings of the placement `models`, is no setting"),
        ({"settings": {"PORT": "x"}}, {}, "PORT='x'"),
        ({"placements": TWO}, {}, "Two placements are named `a`"),
        ({"placements": [{"name": "front"}]}, {}, "`front` is the name of what passes requests on"),
        ({}, {"RAY_REDIS_ADDRESS": "redis"}, "RAY_REDIS_ADDRESS is no address of a Redis: write host:port"),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(
    arguments: dict[str, Any], environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(click.ClickException) as refused:
        build(arguments)

    assert sentence in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("address", ["host:6379", "redis://host:6379", "rediss://host:6379", "a:1,b:2"])
def test_addresses_that_ray_reads_are_taken(address: str) -> None:
    application.check_redis_of_head({"RAY_REDIS_ADDRESS": address})


def test_the_file_of_the_documentation_is_what_ray_and_vecmill_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    with open("docker/ray/serve.yaml", encoding="utf-8") as file:
        deployed = ServeDeploySchema.model_validate(yaml.safe_load(file))
    one = deployed.applications[0]
    for name, value in one.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)

    assert one.import_path == "vecmill.cluster:build"
    assert build(one.args) is not None


def test_what_there_always_is_is_waited_for_as_long_as_a_full_server() -> None:
    """A request whose replica is not there for a moment is not refused; what is scaled to zero takes minutes."""
    placements = [
        PlacementNames(name, frozenset({Task.EMBED}), frozenset(), name == "kept") for name in ("kept", "zero")
    ]
    front = Front(load_settings({"queue_timeout": "45"}), placements, {})

    assert front.patience("kept") == 45
    assert front.patience("zero") < 5


@pytest.mark.parametrize("percent", [0, 50])
def test_an_upgrade_takes_room_for_more_replicas_only_where_it_is_said(percent: int) -> None:
    models = build({"max_surge_percent": percent} if percent else {})._bound_deployment.init_args[2]["models"]

    assert models._bound_deployment._deployment_config.max_surge_percent == percent


def look(path: str, body: object = None, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return look_at(path, Headers({name.replace("_", "-"): value for name, value in headers.items()}), content, SETTINGS)


SETTINGS = load_settings()
CHUNKS = [f"chunk {number} of a code base" for number in range(64)]


@pytest.mark.parametrize(
    ("path", "body", "headers", "lane"),
    [
        ("/v1/embeddings", {"input": "short"}, {}, Lane.INTERACTIVE),
        ("/v1/embeddings", {"input": "short"}, {"x_job_id": "j"}, Lane.BULK),
        ("/v1/embeddings", {"input": CHUNKS}, {}, Lane.BULK),
        ("/v1/embeddings", {"input": CHUNKS, "input_type": "query"}, {}, Lane.INTERACTIVE),
        ("/v1/embeddings", {"input": CHUNKS, "priority": -1}, {}, Lane.INTERACTIVE),
        ("/v1/embeddings", {"input": CHUNKS}, {"x_priority": "interactive"}, Lane.INTERACTIVE),
        ("/embed", {"inputs": CHUNKS}, {}, Lane.BULK),
        ("/v1/rerank", {"query": "q", "documents": CHUNKS}, {}, Lane.INTERACTIVE),
        ("/v1/embeddings", b"{no json", {}, Lane.INTERACTIVE),
    ],
)
def test_the_lane_is_seen(path: str, body: object, headers: dict[str, str], lane: Lane) -> None:
    assert look(path, body, **headers).work.lane is lane


def test_model_and_texts_are_seen_in_every_dialect() -> None:
    bodies = [
        ("/v1/embeddings", {"model": "m", "input": CHUNKS}),
        ("/api/embed", {"model": "m", "input": CHUNKS}),
        ("/embed", {"model": "m", "inputs": CHUNKS}),
        ("/v2/embed", {"model": "m", "texts": CHUNKS}),
    ]

    seen = [look(path, body) for path, body in bodies]

    assert {each.model for each in seen} == {"m"}
    assert len({each.work.key for each in seen}) == 1
    assert look("/v1/rerank", {"model": "r", "query": "q", "documents": [{"text": "a"}]}).task is Task.RERANK
    assert look("/v1/models/owner/name").model == "owner/name"


def test_a_compressed_body_is_seen_too_and_one_that_grows_without_bound_is_not() -> None:
    body = {"model": "m", "input": CHUNKS}

    seen = look("/v1/embeddings", gzip.compress(json.dumps(body).encode()), content_encoding="gzip")
    bomb = look("/v1/embeddings", gzip.compress(b" " * 100_000_000), content_encoding="gzip")

    assert seen.work == look("/v1/embeddings", body).work
    assert bomb.body is None


def test_the_job_is_not_in_the_key_so_that_a_second_run_finds_its_cache() -> None:
    first, second = (look("/embed", {"inputs": CHUNKS, "job_id": name}).work.key for name in ("one", "two"))

    assert first == second


def test_what_is_on_its_way_is_counted_until_it_is_answered_wherever_it_goes() -> None:
    sent, route = Sent(), Route(RoutedRequest(Lane.BULK, 100, 0))
    with sent.counted(route):
        assert sent.replica_of(route) is None
        sent.went(route, "a")
        sent.went(route, "b")
        assert (sent.tokens("a", Lane.BULK), sent.tokens("b", Lane.BULK)) == (0, 100)
    sent.went(route, "a")  # Ray may say so later
    assert (sent.tokens("a", Lane.BULK), sent.tokens("b", Lane.BULK)) == (0, 0)


def test_an_answer_that_took_a_forward_pass_tells_when_that_ended() -> None:
    sent, search = Sent(), Route(RoutedRequest(Lane.INTERACTIVE, 16, 0))
    assert not isfinite(sent.last_answer("a").at)
    with sent.counted(search):
        sent.answered(search, 1.0, 0.0)  # nobody has it yet
        sent.went(search, "a")
        sent.answered(search, 0.0, 0.0)
        assert not isfinite(sent.last_answer("a").at)
        sleep(0.05)
        before = monotonic()
        sent.answered(search, 0.01, 0.02)
    answer = sent.last_answer("a")
    assert before <= answer.at <= monotonic()
    assert 0.03 < answer.overhead_seconds < 1
    assert answer.rest_of_pass == 0.02

    with sent.counted(bulk := Route(RoutedRequest(Lane.BULK, 100, 0))):
        sent.went(bulk, "a")
        sent.answered(bulk, 0.5, 0.0)
    later = sent.last_answer("a")
    assert later.at >= answer.at
    assert later.overhead_seconds == answer.overhead_seconds

    sent.keep_only({"b"})
    assert not isfinite(sent.last_answer("a").at)


@pytest.mark.parametrize(
    ("queued", "busy", "requests", "replicas"),
    [
        ([0.0], [0.0], 0, 0),
        ([0.0], [0.0], 1, 1),
        ([12.0, 3.0], [1.0, 1.0], 9, 3),
        ([0.5, 0.5], [0.9, 0.9], 4, 3),
        ([], [], 2, 1),
    ],
)
def test_replicas_are_wanted_by_what_waits_and_by_how_busy_they_are(
    queued: list[float], busy: list[float], requests: int, replicas: int
) -> None:
    recorded = {"queued_seconds": dict(enumerate(queued)), "busy": dict(enumerate(busy))}
    nothing: Any = None
    context = AutoscalingContext(
        nothing, "models", "app", 1, 1, [], requests, 0, recorded, {}, 0, 8, {}, nothing, nothing, nothing, nothing
    )

    assert QueuedTokens(seconds=5)(context) == (replicas, {})


@pytest.mark.parametrize("path", application.ROUTING.values())
def test_a_router_that_ray_has_sent_shares_what_is_on_its_way_with_the_front(path: str) -> None:
    """Ray sends the class by value, and what it names with it."""
    sent = RequestRouterConfig(request_router_class=path).get_request_router_class()

    assert sent.on_request_routed.__globals__["routes"] is routes
