"""The disk is full, or cannot be written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.batch_lines import assert_whole, batch_input, create, done, ended, upload
from tests.faults.conftest import NewService
from tests.faults.service import Service, small_disk, until

CACHE = {"CACHE_MAX_BYTES": "100000000"}
LINES = 2000
PIECE = 65_536


def fill(folder: Path) -> None:
    """A file in the way, as large as it gets."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (PIECE, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def job_that_ends(service: Service) -> str:
    """A job from its registration to its end; its id."""
    job_id = str(service.post("/jobs", {"project": "p", "total_chunks": 8, "instance_id": "i"})["job_id"])
    assert service.post(f"/jobs/{job_id}/progress", {"current": 8})["current"] == 8
    assert service.post(f"/jobs/{job_id}/complete")["status"] == "completed"
    return job_id


def embed(service: Service, text: str) -> Any:
    return service.post("/v1/embeddings", {"model": "m", "input": text})["data"][0]["embedding"]


@pytest.mark.nightly
def test_a_full_disk_stops_what_needs_it_and_nothing_else(new_service: NewService, tmp_path: Path) -> None:
    state = tmp_path / "state"
    service = new_service(CACHE, within=small_disk(state, "6m"))
    service.start()
    disk = Path(f"/proc/{service.pid}/root{state}")
    assert service.cached(["before"]) == 0
    until(lambda: service.get("/cache")["written"] == 1)
    input_id, ballast_id = upload(service, batch_input(LINES)), upload(service, bytes(2_500_000))
    batch_id = create(service, input_id)
    until(lambda: done(service.get(f"/v1/batches/{batch_id}")) > 0)
    fill(disk)
    until(lambda: "a batch waits for the disk" in service.log())
    files = {path.name for path in (disk / "files").iterdir()}

    assert embed(service, "while it is full")
    assert service.cached(["before"]) == 1
    job_id = job_that_ends(service)
    refused = send(service, b"x" * PIECE)
    assert refused.status_code == 507
    assert "disk" in refused.json()["error"]["message"]
    assert {path.name for path in (disk / "files").iterdir()} == files
    waiting = service.get(f"/v1/batches/{batch_id}")
    assert waiting["status"] == "in_progress"
    assert service.get("/health")["status"] == "ok"
    unhealthy = until(lambda: (health := service.get("/health")) and not health["state"]["ok"] and health)
    assert (unhealthy["jobs"]["ok"], unhealthy["cache"]["ok"], unhealthy["batches"]["ok"]) == (False, False, False)
    assert "full" in unhealthy["state"]["message"]

    assert service.http.delete(f"/v1/files/{ballast_id}").is_success  # there is room, and it is used at once
    assert_whole(service, ended(service, batch_id), LINES)
    (disk / "filler").unlink()
    assert service.cached(["before"]) == 1
    assert until(lambda: not service.get("/cache")["failing"])
    assert service.get(f"/jobs/{job_id}")["status"] == "completed"
    assert send(service, b"x" * PIECE).is_success
    service.assert_healthy()


def send(service: Service, content: bytes) -> httpx.Response:
    return service.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("input.jsonl", content)})


@pytest.mark.nightly
def test_a_disk_that_cannot_be_written_keeps_nothing_from_being_served(new_service: NewService, tmp_path: Path) -> None:
    service = new_service(CACHE, within=small_disk(tmp_path / "state", "1m", read_only=True))
    service.start()
    assert embed(service, "a")
    job_that_ends(service)
    health = service.get("/health")
    assert (health["status"], health["state"]["ok"], health["jobs"]["ok"]) == ("ok", False, False)
    assert "cannot be written" in health["state"]["message"]
    for answer in (send(service, b"{}"), service.http.get("/v1/files"), service.http.get("/v1/batches")):
        assert answer.status_code == 503
        assert "cannot be written (Read-only file system)" in answer.json()["error"]["message"]
    assert os.listdir(f"/proc/{service.pid}/root{tmp_path}/state") == []
    assert sum(" error " in line and "cannot be written" in line for line in service.log().splitlines()) == 1
    assert "Traceback" not in service.log()
