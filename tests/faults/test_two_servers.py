"""Two servers on one state folder."""

from __future__ import annotations

from pathlib import Path

from tests.faults.batch_lines import assert_whole, batch_input, create, done, ended, upload
from tests.faults.conftest import NewService
from tests.faults.service import until
from tests.redis_server import redis_server

LINES = 4000
CHUNK = 16


def test_the_second_is_refused(new_service: NewService) -> None:
    first, second = new_service(), new_service()
    first.launch()
    until(lambda: (first.state / "lock").exists())
    first.wait_until_ready()
    second.launch()
    assert second.ended_with() == 1
    log = " ".join(second.log().split())
    assert f"STATE_DIR={first.state} is in use by another vecmill server" in log
    assert "set REDIS_URL for both" in log
    assert "Traceback" not in log
    first.assert_healthy()


def test_with_redis_they_share_everything(new_service: NewService, tmp_path: Path) -> None:
    redis = tmp_path / "redis"
    redis.mkdir()
    with redis_server(redis) as url:
        settings = {"REDIS_URL": url, "CACHE_MAX_BYTES": "100000000", "BATCH_CHUNK_SIZE": str(CHUNK)}
        first, second = new_service(settings), new_service(settings)
        first.launch()
        second.launch()
        first.wait_until_ready()
        second.wait_until_ready()

        job = first.post("/jobs", {"project": "p", "total_chunks": 8, "instance_id": "i"})["job_id"]
        second.post(f"/jobs/{job}/progress", {"current": 4})
        assert first.get(f"/jobs/{job}")["current"] == 4
        assert first.cached(["computed at the first"]) == 0
        until(lambda: second.cached(["computed at the first"]) == 1)

        batch_id = create(first, upload(first, batch_input(LINES)))
        assert batch_id in [batch["id"] for batch in second.get("/v1/batches")["data"]]
        seen = until(lambda: done(second.get(f"/v1/batches/{batch_id}")))
        first.kill()
        assert seen < LINES
        assert_whole(second, ended(second, batch_id), LINES)
        assert second.get(f"/jobs/{job}")["current"] == 4
        assert second.post(f"/jobs/{job}/complete")["status"] == "completed"
        second.assert_healthy()
