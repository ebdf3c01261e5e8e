"""The port, the state folder, Redis and the disks: each trouble made for real."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis

from tests.faults.service import Service, service, small_disk
from tests.redis_server import redis_server
from tests.servers import free_port
from tests.tiny_checkpoints import tiny_bert
from tests.tools.doctor.command_line import check, checks, doctor_process
from vecmill import __version__
from vecmill.storage.state_folder import StateFolder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[Service]:
    """A server, with a state folder of its own."""
    folder = tmp_path_factory.mktemp("running")
    (folder / "state").mkdir()
    with service(tiny_bert(folder / "tiny", minilm_folder), folder / "state", folder / "log") as server:
        server.start()
        yield server


class Nobody(BaseHTTPRequestHandler):
    """An HTTP server that answers every request with 404."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def another_http_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Nobody) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_free_port_and_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    results = checks("port", "state", PORT=str(free_port()), STATE_DIR=str(tmp_path / "state"))
    assert results["port"]["seen"].endswith("is free")
    assert results["state"]["seen"].endswith("can be written, and is made at the start")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_keeps_nothing_of_the_check(tmp_path: Path) -> None:
    assert check("state", STATE_DIR=str(tmp_path))["seen"] == f"STATE_DIR={tmp_path} can be written"
    assert list(tmp_path.iterdir()) == []


def test_a_port_taken_by_another_server() -> None:
    with another_http_server() as port:
        result = check("port", PORT=str(port))
    assert result["status"] == "fail"
    assert "an HTTP server that is not vecmill (BaseHTTP" in result["seen"]
    assert f"sudo ss -ltnp 'sport = :{port}'" in result["cure"]


def test_an_address_of_another_machine() -> None:
    result = check("port", HOST="192.0.2.1")
    assert result["status"] == "fail"
    assert "Set HOST to an address of this machine" in result["cure"]


def test_beside_the_running_server_all_is_well(running: Service) -> None:
    address = running.url.rpartition(":")[2]
    results = checks("memory", "port", "state", PORT=address, STATE_DIR=str(running.state))
    assert {result["status"] for result in results.values()} == {"ok"}
    assert f"the server at {running.url} has its models loaded" in results["memory"]["seen"]
    assert f"vecmill {__version__} runs there, status ok" in results["port"]["seen"]
    assert f"in use by a vecmill server; one runs at {running.url}" in results["state"]["seen"]
    running.assert_healthy()


def test_a_folder_held_by_a_server_somewhere_else(running: Service) -> None:
    result = check("state", PORT=str(free_port()), STATE_DIR=str(running.state))
    assert (result["status"], "in use by a vecmill server" in result["seen"]) == ("fail", True)
    assert "a STATE_DIR of its own" in result["cure"]
    running.assert_healthy()


def test_servers_with_redis_share_a_folder(tmp_path: Path) -> None:
    held = StateFolder.open(tmp_path / "state", shared=True)
    state = {"STATE_DIR": str(held.path)}
    try:
        with redis_server(tmp_path) as url:
            there = check("state", REDIS_URL=url, **state)
            with_password = url.replace("//", "//nobody:a-redis-password@")
            refused = check("state", REDIS_URL=with_password, **state)
        away = check("state", REDIS_URL=with_password, **state)
        alone = check("state", **state)
    finally:
        held.close()
    assert there["status"] == "ok"
    assert "REDIS_URL (127.0.0.1) answers, version" in there["seen"]
    assert (refused["status"], away["status"], alone["status"]) == ("fail", "fail", "fail")
    assert "REDIS_URL (127.0.0.1) answers and cannot be used" in refused["seen"]
    assert "correct the user and the password" in refused["cure"]
    assert "REDIS_URL (127.0.0.1) does not answer (ConnectionError)" in away["seen"]
    assert "a-redis-password" not in str((refused, away))


def test_what_is_seen_of_redis(tmp_path: Path) -> None:
    assert check("redis")["seen"].startswith("REDIS_URL is not set")
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        bare = check("redis", REDIS_URL=url)
        client.config_set("maxmemory", "256mb")
        client.config_set("maxmemory-policy", "volatile-lru")
        client.config_set("appendonly", "yes")
        for name in ("a", "b"):
            client.set(f"vecmill:replica:{name}", "{}", ex=60)
        good = check("redis", REDIS_URL=url, PORT=str(free_port()))
        client.slaveof("127.0.0.1", 1)
        follower = check("redis", REDIS_URL=url)
    away = check("redis", REDIS_URL=url)
    assert (bare["status"], good["status"], follower["status"], away["status"]) == ("warn", "ok", "fail", "fail")
    assert "no maxmemory" in bare["cure"]
    assert "appendonly yes" in bare["cure"]
    assert "volatile-lru, appendonly on disk, 2 other servers of vecmill" in good["seen"]
    assert (good["details"]["maxmemory_bytes"], good["details"]["other_servers"]) == (256 * 2**20, 2)
    assert "name that one in REDIS_URL" in follower["cure"]
    assert "does not answer (ConnectionError)" in away["seen"]


def test_batches_have_a_folder_that_servers_share(tmp_path: Path) -> None:
    state = {"STATE_DIR": str(tmp_path / "state"), "BATCH_DIR": str(tmp_path / "common")}
    assert check("state", **state)["status"] == "ok"
    held = StateFolder.open(tmp_path / "common", shared=True, setting="BATCH_DIR")
    assert check("state", **state)["status"] == "ok"
    held.close()
    alone = StateFolder.open(tmp_path / "common")
    refused = check("state", **state)
    alone.close()
    assert (refused["status"], "is the STATE_DIR of a server" in refused["seen"]) == ("fail", True)


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    result = check("state", STATE_DIR=str(tmp_path / "state"))
    assert (result["status"], result["seen"]) == ("fail", f"STATE_DIR={tmp_path}/state is a file")


def test_a_folder_on_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    ended = doctor_process(
        "--only",
        "state",
        within=tuple(small_disk(tmp_path, "1m", read_only=True)),
        environment={"STATE_DIR": str(tmp_path)},
    )
    assert ended.returncode == 1
    assert "cannot be written (Read-only file system)" in ended.stdout


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    ended = doctor_process(
        "--only", "disk", within=tuple(small_disk(tmp_path, "1m")), environment={"STATE_DIR": str(tmp_path)}
    )
    assert ended.returncode == 1
    assert f"1.0 MB free for STATE_DIR={tmp_path}\n" in ended.stdout
    assert "cure: Make room, or set STATE_DIR" in ended.stdout


def test_a_disk_with_less_room_than_the_cache_may_take_is_a_warning() -> None:
    result = check("disk", CACHE_MAX_BYTES=str(10**18))
    assert result["status"] == "warn"
    assert "Lower CACHE_MAX_BYTES" in result["cure"]
    assert check("disk", CACHE_MAX_BYTES="1000000")["status"] == "ok"
