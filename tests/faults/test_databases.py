"""The databases are garbage, or another program has them locked."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import NewService
from tests.faults.service import Service, until

CACHE = {"CACHE_MAX_BYTES": "100000000"}
GARBAGE = b"neither a database nor anything else " * 3000
DATABASES = ("cache.db", "jobs.db")


def register(service: Service, project: str) -> str:
    return str(service.post("/jobs", {"project": project, "total_chunks": 8, "instance_id": "i"})["job_id"])


def open_jobs(service: Service) -> list[str]:
    listed = service.get("/jobs")
    return [job["id"] for job in (*listed["active"], *listed["queued"])]


def keeps(service: Service, text: str) -> None:
    """What is computed now is on the disk, even if it takes until the database is tried again."""
    before = service.get("/cache")["written"]

    def kept() -> bool:
        cache = service.get("/cache")
        return bool(cache["written"] > before and not cache["failing"])

    until(lambda: service.cached([text]) == 1 and kept())


def aside(state: Path, name: str) -> list[Path]:
    """What was put aside of a database, without its log."""
    return [path for path in state.glob(f"{name}.aside-*") if not path.name.endswith(("-wal", "-shm"))]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def test_garbage_is_put_aside(new_service: NewService) -> None:
    service = new_service(CACHE)
    for name in DATABASES:
        (service.state / name).write_bytes(GARBAGE)
    service.start()
    keeps(service, "at the start")
    first = register(service, "a")
    service.assert_healthy()
    for name in DATABASES:
        assert [path.read_bytes() for path in aside(service.state, name)] == [GARBAGE]
        assert f"{name} cannot be read" in service.log()

    for name in DATABASES:
        for suffix in ("", "-wal"):
            with (service.state / f"{name}{suffix}").open("rb+") as file:
                file.write(GARBAGE)
    for number in range(20):
        assert service.cached([f"meanwhile {number}"]) == 0
    second = register(service, "b")
    assert service.post(f"/jobs/{first}/progress", {"current": 4})["current"] == 4
    keeps(service, "afterwards")
    service.assert_healthy()
    for name in DATABASES:
        assert len(aside(service.state, name)) == 2
    service.kill()

    service.start()
    assert open_jobs(service) == [first, second]
    assert service.get(f"/jobs/{first}")["current"] == 4
    assert service.cached(["afterwards"]) == 1
    service.assert_healthy()
    assert "Traceback" not in service.log()


@pytest.mark.nightly
def test_a_locked_database_is_waited_for_by_nobody(new_service: NewService) -> None:
    """Nor is it at a start that comes meanwhile."""
    service = new_service(CACHE)
    service.start()
    keeps(service, "before")
    before = register(service, "before")
    with locked(service.state / "cache.db"), locked(service.state / "jobs.db"):
        for number in range(20):
            service.post("/v1/embeddings", {"model": "m", "input": f"meanwhile {number}"})
        lost = register(service, "lost")
        assert open_jobs(service) == [before, lost]
        until(lambda: service.get("/cache")["failing"])
        assert service.get("/health")["status"] == "ok"
        service.kill()

        service.start()
        assert service.cached(["at the start"]) == 0
        meanwhile = register(service, "meanwhile")
        assert service.get(f"/jobs/{meanwhile}")["status"] == "active"
        assert service.get("/health")["status"] == "ok"
    keeps(service, "afterwards")
    after = register(service, "after")
    until(lambda: "the jobs are written to the database again" in service.log())
    assert open_jobs(service) == [before, meanwhile, after]
    service.assert_healthy()
    service.kill()

    service.start()
    assert open_jobs(service) == [before, meanwhile, after]
    assert service.cached(["before", "afterwards"]) == 2
    assert "Traceback" not in service.log()
