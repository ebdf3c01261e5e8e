"""The state of every format that was ever released is opened by the present server, which goes on with it.

`released` has what each left: a cache, jobs that ended, ran and waited, a batch that ended and one in the middle. A
format that changes again gets its own, by `tests.upgrades.record`.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from tests.redis_server import redis_server
from tests.servers import free_port, run, running, vecmill_command
from tests.upgrades.record import RELEASED, TEXTS, dumped
from vecmill import __version__
from vecmill.core.errors import JobsUnavailable, StartupError
from vecmill.core.protocols import StoreFailed
from vecmill.storage.files import FileLock
from vecmill.storage.formats import FORMAT, newer_state
from vecmill.storage.redis import RedisJobs, RedisVectors
from vecmill.storage.redis_connection import check_usable
from vecmill.storage.sqlite import open_database
from vecmill.storage.state_folder import StateFolder

NAMES = sorted(path.name.removesuffix(".tar.xz") for path in RELEASED.glob("*.tar.xz"))
# By day the oldest: what has changed most since.
EACH = [pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]


def unpacked(name: str, folder: Path) -> dict[str, Any]:
    """A released state in a folder; what its client was told."""
    with tarfile.open(RELEASED / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    (folder / "told.json").unlink()
    shift = time.time() - max(batch["created_at"] for batch in told["batches"].values())
    for path in (*folder.glob("batches/*/batch.json"), *folder.glob("files/*.json")):
        path.write_text(json.dumps(_later(json.loads(path.read_text()), shift)))
    told["batches"] = {name: _later(batch, int(shift)) for name, batch in told["batches"].items()}
    return told


def _later(record: dict[str, Any], shift: float) -> dict[str, Any]:
    """A record as if it had been made now: batches and files expire."""
    return {key: value + shift if key.endswith("_at") and value else value for key, value in record.items()}


def restored(keys: dict[str, dict[str, Any]], url: str) -> None:
    with redis.Redis.from_url(url) as client:
        for key, entry in keys.items():
            client.restore(key.encode("latin-1"), max(0, entry["expires"]), base64.b64decode(entry["value"]))


def ended(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"{batch_id} does not end")


@pytest.mark.parametrize("name", EACH)
def test_the_present_server_goes_on_with_what_it_finds(name: str, tmp_path: Path) -> None:
    told = unpacked(name, tmp_path / "state")
    port = free_port()
    settings = {"STATE_DIR": str(tmp_path / "state"), "CACHE_MAX_BYTES": "10000000", "JOBS_MAX_ACTIVE": "1"}
    with ExitStack() as stack:
        if told["redis"] is not None:
            # As it was written: a newer Redis reads what an older one dumped.
            settings["REDIS_URL"] = stack.enter_context(redis_server(tmp_path))
            restored(told["redis"], settings["REDIS_URL"])
        server = stack.enter_context(running(vecmill_command(port), port, "/ready", settings))
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        _same_vectors(client, told)
        _same_jobs(client, told)
        _batches_go_on(client, told)
        if told["redis"] is not None:
            assert "vecmill:format" in dumped(settings["REDIS_URL"])
    assert list((tmp_path / "state").glob("*.aside-*")) == []
    assert list((tmp_path / "state").glob("*.unreadable")) == []
    assert json.loads((tmp_path / "state/format").read_text())["format"] == FORMAT


def _same_vectors(client: httpx.Client, told: dict[str, Any]) -> None:
    answer = client.post("/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": TEXTS}).json()
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    # The cache keeps 16 bits, and versions may round otherwise: what is stated of a cosine.
    assert (np.einsum("nd,nd->n", vectors, np.array(told["vectors"])) > 1 - 2e-4).all()


def _same_jobs(client: httpx.Client, told: dict[str, Any]) -> None:
    for name, before in told["jobs"].items():
        now = client.get(f"/jobs/{before['id']}").json()
        for key in ("id", "project", "total_chunks", "instance_id", "current", "error", "created_at"):
            assert now.get(key) == before.get(key), (name, key)
        # Where the time since was longer than a lease, Redis' clock says so, and the job has failed for it.
        gone = told["redis"] is not None and now["status"] == "failed"
        assert gone or now["status"] == before["status"], name


def _batches_go_on(client: httpx.Client, told: dict[str, Any]) -> None:
    done = client.get(f"/v1/batches/{told['batches']['completed']['id']}").json()
    for key in ("status", "request_counts", "output_file_id"):
        assert done[key] == told["batches"]["completed"][key], key
    assert abs(done["completed_at"] - told["batches"]["completed"]["completed_at"]) <= 1
    assert len(client.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()) == 3
    rest = ended(client, told["batches"]["in_progress"]["id"])
    assert (rest["status"], rest["request_counts"]["completed"]) == ("completed", 800)
    lines = client.get(f"/v1/files/{rest['output_file_id']}/content").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"line-{number}" for number in range(800)]


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A folder that a version to come has written."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "format").write_text(json.dumps({"format": FORMAT + 1, "written_by": "9.0.0"}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_a_newer_state_stops_the_start_and_stays_as_it_is(newer: Path) -> None:
    before = contents(newer)
    done = run(vecmill_command(free_port(), "--state-dir", str(newer)), env=os.environ)
    assert done.returncode == 2
    assert f"is of format {FORMAT + 1}, written by vecmill 9.0.0" in done.output
    assert f"newer than what vecmill {__version__} reads ({FORMAT})" in done.output
    assert "Install that version again" in done.output
    assert contents(newer) == before


def test_the_doctor_names_a_newer_state(newer: Path) -> None:
    command = [*vecmill_command(0)[:3], "doctor", "--only", "state"]
    done = run(command, env=os.environ | {"STATE_DIR": str(newer)})
    assert done.returncode != 0
    assert "written by vecmill 9.0.0" in " ".join(done.output.split())
    assert list(contents(newer)) == ["format"]


@pytest.mark.parametrize("name", ["jobs.db", "cache.db"])
def test_a_newer_database_is_as_good_as_a_newer_folder(name: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / name) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = contents(tmp_path)
    assert f"{name} is of format 7" in str(newer_state(tmp_path))
    with pytest.raises(StartupError, match=r"is of format 7, which is newer"):
        StateFolder.open(tmp_path)
    with pytest.raises(OSError, match="written by a newer vecmill"):
        open_database(tmp_path / name, "CREATE TABLE a (b)", 1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 5000, b'{"format": "2"}', b'{"format": true}', b"null", b"\xff"])
def test_a_damaged_mark_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "format").write_bytes(content)
    assert newer_state(tmp_path) is None
    StateFolder.open(tmp_path).close()
    assert json.loads((tmp_path / "format").read_text()) == {"format": FORMAT, "written_by": __version__}


@pytest.mark.parametrize("kind", ["folder", "pipe", "circle"])
def test_a_mark_that_cannot_be_read_leaves_the_folder_alone(kind: str, tmp_path: Path) -> None:
    """Nobody knows then who wrote it: the server keeps nothing, and nothing waits for the other end of a pipe."""
    mark = tmp_path / "format"
    if kind == "folder":
        mark.mkdir()
    elif kind == "pipe":
        os.mkfifo(mark)
    else:
        mark.symlink_to("format")
    before = mark.lstat()
    folder = StateFolder.open(tmp_path)
    assert "nothing outlives this process" in str(folder.problem)
    folder.close()
    again = FileLock.take(tmp_path / "lock")
    assert again is not None
    again.release()
    command = [*vecmill_command(0)[:3], "doctor", "--only", "state"]
    done = run(command, env=os.environ | {"STATE_DIR": str(tmp_path)})
    assert done.returncode != 0
    assert "cannot be used" in done.output
    assert (mark.lstat().st_ino, mark.lstat().st_mtime) == (before.st_ino, before.st_mtime)


def test_a_newer_mark_may_say_more(tmp_path: Path) -> None:
    (tmp_path / "format").write_text(json.dumps({"parts": ["x" * 50] * 200, "format": FORMAT + 1, "written_by": "9"}))
    assert f"is of format {FORMAT + 1}" in str(newer_state(tmp_path))


def test_a_pipe_is_no_database_of_a_newer_version(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "jobs.db")
    assert newer_state(tmp_path) is None


def test_the_folder_of_batches_is_looked_at_too(newer: Path) -> None:
    with pytest.raises(StartupError, match=r"BATCH_DIR=.*with another BATCH_DIR"):
        StateFolder.open(newer, shared=True, setting="BATCH_DIR")


async def test_what_a_newer_version_wrote_to_redis_stops_the_start(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        await check_usable(url)
        assert client.get("vecmill:format") == str(FORMAT).encode()
        client.set("vecmill:format", FORMAT + 1)
        with pytest.raises(StartupError, match=rf"of format {FORMAT + 1}, which is newer"):
            await check_usable(url)
        assert client.get("vecmill:format") == str(FORMAT + 1).encode()


async def test_a_redis_that_comes_later_is_looked_at_then(tmp_path: Path) -> None:
    """It was away when the server was started: what a newer version has written there stays as it is."""
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.set("vecmill:format", FORMAT + 1)
        jobs, vectors = RedisJobs(url), RedisVectors(url)
        with pytest.raises(JobsUnavailable, match=rf"of format {FORMAT + 1}, which is newer"):
            await jobs.take_turn(b"me")
        with pytest.raises(StoreFailed, match=rf"of format {FORMAT + 1}, which is newer"):
            vectors.put({bytes(16): b"a vector"}, [])
        assert client.keys() == [b"vecmill:format"]
        client.delete("vecmill:format")
        assert await jobs.take_turn(b"me")
        vectors.put({bytes(16): b"a vector"}, [])
        assert client.get("vecmill:format") == str(FORMAT).encode()
        await jobs.close()
        vectors.close()
