"""The shipped file on two nodes by the documented commands: placements, keys, streams, upgrades, a lost head.

Both nodes are processes of this machine, and share one cluster, which takes minutes to start where the machine is busy.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra `ray`; `make test-ray` installs it")

from ray.serve.schema import ServeDeploySchema

from tests.cluster.ray_nodes import Node, Nodes, two_nodes
from tests.faults.service import until
from tests.redis_server import redis_server
from tests.servers import free_port, running, vecmill_command
from tests.tiny_checkpoints import tiny_cross_encoder

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

START_WITHIN_S = 400
MODEL = "all-MiniLM-L6-v2"
PEOPLE, LIMITED = "people-key-of-32-characters-0000", "limited-key-of-32-characters-000"
MAY = {"Authorization": f"Bearer {PEOPLE}"}
TEXTS = [f"text number {number}" for number in range(40)]
CLIENTS = 3  # at each node
SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "MAX_BATCH_TOKENS": "256"}


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_cross_encoder(tmp_path_factory.mktemp("reranker"), kind="bert", tokenizer_from=minilm_folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the environment of `ray start`, where keys belong."""
    folder = tmp_path_factory.mktemp("keys")
    keys = folder / "api-keys"
    keys.write_text(f"people:{PEOPLE}\nlimited:{LIMITED} jobs=1\n")
    keys.chmod(0o600)
    return {**SMALL, "API_KEY_FILE": str(keys), "STATE_DIR": str(folder / "state"), "QUEUE_TIMEOUT": "200"}


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, redis_url: str, settings: dict[str, str]) -> Iterator[Nodes]:
    address = redis_url.removeprefix("redis://").removesuffix("/0")
    with two_nodes(tmp_path_factory.mktemp("nodes"), address, settings) as running:
        yield running


def shipped(port: int, redis_url: str, reranker: Path, **settings: str) -> dict[str, Any]:
    """The file of the documentation, with models that are here, and the placements that it shows."""
    content: dict[str, Any] = yaml.safe_load(Path("docker/ray/serve.yaml").read_text("utf-8"))
    content["http_options"] |= {"host": "127.0.0.1", "port": port}
    application = content["applications"][0]
    shared = {"EMBED_MODEL": MODEL, "RERANK_MODEL": "none", "DEVICE": "cpu", "REDIS_URL": f"{redis_url[:-1]}1"}
    application["runtime_env"]["env_vars"] |= shared
    application["args"] = {
        "fronts": 2,
        "front_cpus": 1,
        "placements": [
            # Two CPUs of three, so that each node has one.
            {"name": "embed", "replicas": 2, "num_cpus": 2, "settings": settings},
            {"name": "rerank", "num_cpus": 0, "settings": {"RERANK_MODEL": str(reranker)}},
        ],
    }
    return content


def deploy(nodes: Nodes, content: dict[str, Any], folder: Path) -> None:
    """`serve deploy`, and wait until all runs as the file says."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(content))
    nodes.serve("deploy", str(file))
    until(lambda: is_running(nodes), START_WITHIN_S)


def is_running(nodes: Nodes) -> bool:
    with suppress(AssertionError, KeyError):  # the dashboard may be away for a moment
        status = yaml.safe_load(nodes.serve("status"))
        deployments = status["applications"]["vecmill"]["deployments"].values()
        return bool(
            status["applications"]["vecmill"]["status"] == "RUNNING"
            and all(each["status"] == "HEALTHY" for each in deployments)
            and all(set(each["replica_states"]) == {"RUNNING"} for each in deployments)
            and set(status["proxies"].values()) == {"HEALTHY"}
        )
    return False


class Load:
    """Clients that ask until they are stopped, each on a connection of its own to the proxy of a node."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        with closing(nodes.connection(nodes.worker)) as connection:
            status, found = nodes.post("/v1/embeddings", {"model": MODEL, "input": TEXTS}, connection, **MAY)
        assert status == 200, found
        self._expected = np.array([row["embedding"] for row in found["data"]])
        self.outcomes: Counter[str] = Counter()

    @contextmanager
    def at(self, *asked: Node) -> Iterator[None]:
        """While the block runs."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._ask, args=(node, number, stop)) for node in asked for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def after(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.outcomes.total() + count
        until(lambda: self.outcomes.total() >= wanted, 300)

    def _ask(self, node: Node, number: int, stop: threading.Event) -> None:
        with closing(self._nodes.connection(node)) as connection:
            while not stop.is_set():
                number += 1
                self.outcomes[self._outcome(connection, number)] += 1

    def _outcome(self, connection: HTTPConnection, number: int) -> str:
        index = number % len(TEXTS)
        body = {"model": MODEL, "input": [TEXTS[index], f"new {threading.get_ident()} {number}"]}
        try:
            return self._judged(*self._nodes.post("/v1/embeddings", body, connection, **MAY), index)
        except (OSError, HTTPException) as error:
            return repr(error)

    def _judged(self, status: int, found: Any, index: int) -> str:
        if status != 200:
            return f"{status} {found}"
        got = np.array(found["data"][0]["embedding"])
        return "right" if np.allclose(got, self._expected[index], atol=1e-4) else "wrong"


def test_serve_run_is_one_server_until_it_is_ended(nodes: Nodes, settings: dict[str, str]) -> None:
    nodes.serve("start", "--http-host", "127.0.0.1", "--http-port", str(nodes.port))
    process = nodes.start("run", "vecmill.cluster:app")
    url = f"http://127.0.0.1:{nodes.port}"

    until(lambda: answered(f"{url}/ready") == 200, START_WITHIN_S)
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "any", "input": "x"}, headers=MAY, timeout=60)
    process.send_signal(signal.SIGINT)

    assert len(answer.json()["data"][0]["embedding"]) == 384
    assert process.wait(120) == 0
    assert answered(f"{url}/ready") is None
    assert not nodes.pids("ray::ServeReplica")


def answered(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return None


def test_serve_build_writes_what_serve_deploy_takes(nodes: Nodes, tmp_path: Path) -> None:
    nodes.serve("build", "vecmill.cluster:app", "--output-path", str(tmp_path / "built.yaml"))
    built = ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "built.yaml").read_text()))

    (application,) = built.applications
    assert application.import_path == "vecmill.cluster:app"
    assert {each.name for each in application.deployments} == {"models", "front"}


@pytest.fixture(scope="module")
def deployed(nodes: Nodes, redis_url: str, reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    """The file, deployed."""
    deploy(nodes, shipped(nodes.port, redis_url, reranker), tmp_path_factory.mktemp("deployed"))
    return nodes


def of_each_node(nodes: Nodes, path: str, body: object, **headers: str) -> Sequence[tuple[int, Any]]:
    """The answers by way of each node."""
    answers = []
    for node in (nodes.head, nodes.worker):
        with closing(nodes.connection(node)) as connection:
            answers.append(nodes.post(path, body, connection, **headers))
    return answers


def test_both_models_are_found_by_their_names_on_every_node(deployed: Nodes, reranker: Path) -> None:
    ranking = {"query": "a", "documents": ["b", "c"]}
    listed = httpx.get(f"http://127.0.0.1:{deployed.port}/v1/models", headers=MAY, timeout=60).json()["data"]
    names = {model["id"] for model in listed}

    assert {name.rpartition("/")[2] for name in names} == {MODEL, reranker.name}
    for name in (*names, reranker.name):
        path = "/v1/rerank" if name.endswith(reranker.name) else "/v1/embeddings"
        body = {"model": name, **(ranking if path == "/v1/rerank" else {"input": "a"})}
        assert [status for status, _ in of_each_node(deployed, path, body, **MAY)] == [200, 200]
    unnamed = of_each_node(deployed, "/v1/rerank", {"model": "any", **ranking}, **MAY)
    assert [answer["results"] for _, answer in unnamed] == [unnamed[0][1]["results"]] * 2


def test_a_request_without_key_is_401_as_at_a_server_alone(deployed: Nodes, settings: dict[str, str]) -> None:
    paths = ("/v1/embeddings", "/embed", "/v2/embed", "/api/embed", "/v1/rerank", "/rerank", "/v2/rerank", "/jobs")
    port = free_port()
    alone = {**settings, "EMBED_MODEL": MODEL, "RERANK_MODEL": "none", "STATE_DIR": settings["STATE_DIR"] + "-alone"}
    with running(vecmill_command(port), port, "/ready", alone) as server:
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer of-nobody"}):
                expected = httpx.post(server.url + path, json={"input": "a"}, headers=headers)
                got = of_each_node(deployed, path, {"input": "a"}, **headers)
                assert got == [(401, expected.json())] * 2, path


def test_the_limits_of_a_key_hold_over_all_nodes(deployed: Nodes) -> None:
    key = {"Authorization": f"Bearer {LIMITED}"}
    job = {"project": "p", "total_chunks": 3}

    first, second = of_each_node(deployed, "/jobs", job, **key)

    assert (first[0] // 100, second[0]) == (2, 429)
    assert of_each_node(deployed, "/jobs", job, **MAY)[1][0] // 100 == 2


def test_bodies_and_answers_stream_through_every_node(deployed: Nodes) -> None:
    url = f"http://127.0.0.1:{deployed.port}"
    line = b'{"custom_id": "%d", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}\n'
    content = b"".join(line % number for number in range(450_000))  # more than a request may have

    for _ in range(2):
        files = {"file": ("a.jsonl", content)}
        sent = httpx.post(f"{url}/v1/files", headers=MAY, timeout=240, files=files, data={"purpose": "batch"})
        fetched = httpx.get(f"{url}/v1/files/{sent.json()['id']}/content", headers=MAY, timeout=240)
        assert fetched.content == content
    for node in (deployed.head, deployed.worker):
        with closing(deployed.connection(node)) as connection:
            connection.request("GET", "/jobs/events", headers=MAY)
            answer = connection.getresponse()
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.read1(100)
            answer.close()


def test_an_upgrade_by_serve_deploy_fails_no_request(
    deployed: Nodes, redis_url: str, reranker: Path, tmp_path: Path
) -> None:
    before = set(deployed.pids("ray::ServeReplica:vecmill:embed"))
    load = Load(deployed)

    with load.at(deployed.head, deployed.worker):
        load.after(20)
        deploy(deployed, shipped(deployed.port, redis_url, reranker, MAX_CLIENT_BATCH_SIZE="1000"), tmp_path)
        load.after(20)

    assert set(load.outcomes) == {"right"}
    assert not before & set(deployed.pids("ray::ServeReplica:vecmill:embed"))


def test_without_its_head_the_other_node_answers_and_jobs_go_on(deployed: Nodes) -> None:
    """The head, with a replica, a front and Ray's controller, is killed; later it comes back."""
    load = Load(deployed)
    (_, job), *_ = of_each_node(deployed, "/jobs", {"project": "p", "total_chunks": 9}, **MAY)
    progress = f"/jobs/{job['job_id']}/progress"

    with load.at(deployed.worker), closing(deployed.connection(deployed.worker)) as connection:
        load.after(30)
        deployed.head.kill()
        load.after(60)
        status, view = deployed.post(progress, {"current": 4}, connection, **MAY)
        assert (status, view["current"]) == (200, 4)
        deployed.start_head()
        until(lambda: is_running(deployed), START_WITHIN_S)
        load.after(30)

    assert set(load.outcomes) == {"right"}
    assert [view["current"] for _, view in of_each_node(deployed, progress, {"current": 9}, **MAY)] == [9, 9]
    assert len(deployed.pids("ray::ServeReplica:vecmill:embed")) == 2
