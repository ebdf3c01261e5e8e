"""The server is killed again and again while it writes vectors, and while it starts on an older version's databases."""

from __future__ import annotations

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.faults.batch_lines import TOLERANCE
from tests.faults.conftest import NewService
from tests.faults.service import Service

KILLS = 30
CACHE = {"CACHE_MAX_BYTES": "100000000"}
TEXTS = 64
OLDER = -1  # than the first there was


def embed(service: Service, texts: list[str]) -> np.ndarray:
    return np.array(service.post("/embed", {"inputs": texts}))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [KILLS])
def test_every_vector_is_right_after_a_kill_in_a_write(new_service: NewService, kills: int) -> None:
    chance = random.Random(22)
    service = new_service(CACHE)
    service.start()
    known: dict[str, np.ndarray] = {}
    for number in range(kills):
        texts = [f"{number} {index}" for index in range(TEXTS)]
        known |= zip(texts, embed(service, texts), strict=True)
        time.sleep(chance.uniform(0.0, 0.2))  # a write begins within 0.1 s
        service.kill()
        service.start()
        some = chance.sample(sorted(known), TEXTS)
        np.testing.assert_allclose(embed(service, some), [known[text] for text in some], rtol=0, atol=100 * TOLERANCE)
        assert not service.get("/cache")["failing"]
    service.assert_healthy()
    assert not list(service.state.glob("*.aside-*"))


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_kill_while_an_older_versions_cache_is_put_aside(new_service: NewService) -> None:
    chance = random.Random(24)
    service = new_service(CACHE)
    service.start()
    job = service.post("/jobs", {"project": "p", "total_chunks": 8, "instance_id": "i"})["job_id"]
    service.post(f"/jobs/{job}/progress", {"current": 3})
    service.kill()
    for _ in range(KILLS):
        if (service.state / "cache.db").exists():
            set_version(service.state / "cache.db", OLDER)
        service.launch()
        time.sleep(chance.uniform(0.0, 1.5))
        service.kill()
    service.start()
    assert service.get(f"/jobs/{job}")["current"] == 3
    assert service.cached(["after"]) == 0
    service.assert_healthy()
