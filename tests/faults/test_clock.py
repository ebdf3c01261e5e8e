"""Somebody sets the machine's clock back by two days, while the server runs and while it does not."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.batch_lines import assert_whole, batch_input, create, done, ended, upload
from tests.faults.conftest import NewService
from tests.faults.service import Service, until

DAYS = 2
DAY = 86_400.0
LINES = 6000
SETTINGS = {"BATCH_CHUNK_SIZE": "16", "JOBS_MAX_ACTIVE": "1", "CACHE_MAX_BYTES": "100000000"}


def states(service: Service, jobs: list[str]) -> list[tuple[str, int]]:
    """Of each job, and how far it is."""
    answers = [service.get(f"/jobs/{job}") for job in jobs]
    return [(job["status"], job["current"]) for job in answers]


@pytest.mark.nightly
def test_neither_jobs_nor_batches_nor_vectors_mind(new_service: NewService) -> None:
    service = new_service(SETTINGS, serve=("-m", "tests.faults.moved_clock", str(DAYS), "serve"))
    service.start()
    jobs = [
        service.post("/jobs", {"project": name, "total_chunks": 8, "instance_id": "i"})["job_id"] for name in ("a", "b")
    ]
    service.post(f"/jobs/{jobs[0]}/progress", {"current": 4})
    created = service.get(f"/jobs/{jobs[0]}")["created_at"]
    assert created > time.time() + (DAYS - 0.5) * DAY
    assert service.cached(["before"]) == 0
    file_id = upload(service, batch_input(LINES))
    batch_id = create(service, file_id)
    before = until(lambda: done(service.get(f"/v1/batches/{batch_id}")))

    os.kill(service.pid, signal.SIGUSR1)
    until(lambda: done(service.get(f"/v1/batches/{batch_id}")) > before)
    assert states(service, jobs) == [("active", 4), ("queued", 0)]
    assert service.cached(["before"]) == 1
    service.kill()

    again = new_service(SETTINGS)
    again.start()
    assert states(again, jobs) == [("active", 4), ("queued", 0)]
    assert again.cached(["before"]) == 1
    batch = ended(again, batch_id)
    assert_whole(again, batch, LINES)
    moments = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed", "expires")]
    assert moments == sorted(moments)
    assert batch["expires_at"] - batch["created_at"] == DAY
    assert again.get(f"/v1/files/{file_id}")["id"] == file_id
    for job in jobs:
        ended_job = again.post(f"/jobs/{job}/complete")
        assert (ended_job["status"], ended_job["created_at"] >= created) == ("completed", True)
        assert 0 <= ended_job["duration_seconds"] < DAY
    again.assert_healthy()
