"""The server is killed again and again while clients index through it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Event

import pytest

from tests.faults.conftest import NewService
from tests.faults.indexer import BATCH, Indexer
from tests.faults.service import Service, until

KILLS = 30
KILLS_WHILE_STARTING = 3
PROJECTS = ("a", "b", "c")
BATCHES = 100  # of each
AT_ONCE = 2048  # texts of one request
# A vector is written some 100 ms after its answer; a disk that is busy with other tests has taken more than a second.
WRITTEN_WITHIN = 5.0


class JobLives:
    """Jobs over many processes, each of which is killed at a random moment."""

    def __init__(self, service: Service, serving: Event, indexers: Sequence[Indexer], chance: random.Random) -> None:
        self._service = service
        self._serving = serving
        self._indexers = indexers
        self._chance = chance
        self._answered_before = 0
        self._computed_at_start = 0
        self._written = 0
        self._killed_at = 0.0

    def kill_at_work(self, lives_left: int) -> None:
        """Let the clients do at most their share of the remaining batches, and kill the server soon after."""
        before = len(self._answered())
        goal = before + self._chance.randint(0, (len(PROJECTS) * BATCHES - before) // (lives_left + 1))
        until(lambda: self._look() >= goal)
        if self._chance.random() < 0.5:
            written = self._computed(len(self._answered()) - 1)
            until(lambda: self._look() > 0 and self._written >= written, WRITTEN_WITHIN)
        time.sleep(self._chance.uniform(0.0, 0.05))
        self._end()

    def kill_while_starting(self) -> None:
        """Start the server and kill it before it is ready, or just when it becomes ready."""
        self._service.launch()
        time.sleep(self._chance.uniform(0.2, 3.0))
        self._service.kill()

    def begin(self) -> None:
        """Start the server, look at what it knows, and let the clients go on."""
        self._service.start()
        self._assert_jobs()
        self._assert_vectors()
        self._serving.set()

    def _answered(self) -> list[tuple[float, Sequence[str]]]:
        return list(chain.from_iterable(indexer.answered for indexer in self._indexers))

    def _computed(self, batches: int) -> int:
        """Texts that the present process has computed when the clients have so many answers."""
        return self._computed_at_start + BATCH * (batches - self._answered_before)

    def _look(self) -> int:
        self._written = self._service.get("/cache")["written"]
        return len(self._answered())

    def _end(self) -> None:
        self._killed_at = time.monotonic()
        self._service.kill()
        self._serving.clear()

    def _assert_jobs(self) -> None:
        """All jobs exist, in order, with at least the progress that was acknowledged; one open job is active."""
        reported = [(indexer.id, indexer.acknowledged, indexer.completed) for indexer in self._indexers]
        listed = self._service.get("/jobs")
        jobs = {job["id"]: job for name in ("active", "queued", "recent") for job in listed[name]}
        still_open = [job["id"] for job in (*listed["active"], *listed["queued"])]
        assert set(jobs) == {job_id for job_id, _, _ in reported}
        assert still_open == [job_id for job_id, _, _ in reported if job_id in still_open]
        assert len(listed["active"]) == min(1, len(still_open))
        assert {job["status"] for job in listed["recent"]} <= {"completed"}
        for job_id, acknowledged, completed in reported:
            assert jobs[job_id]["current"] >= acknowledged
            assert not completed or jobs[job_id]["status"] == "completed"

    def _assert_vectors(self) -> None:
        """No text is computed again if its vector was written; only vectors of the latest answers may be missing."""
        answered = self._answered()
        older = [text for moment, texts in answered if moment < self._killed_at - WRITTEN_WITHIN for text in texts]
        newer = [text for moment, texts in answered if moment >= self._killed_at - WRITTEN_WITHIN for text in texts]
        assert self._cached(older) == len(older)
        missing = len(newer) - self._cached(newer)
        # One request of the active job's may have been computed and not answered.
        assert missing <= self._computed(len(answered) + 1) - self._written
        self._computed_at_start, self._answered_before, self._written = missing, len(answered), 0

    def _cached(self, texts: Sequence[str]) -> int:
        return sum(self._service.cached(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE))

    def assert_ended(self) -> None:
        """Every job is completed, and every computed vector is served from the cache."""
        self._assert_jobs()
        listed = self._service.get("/jobs")
        assert (listed["active"], listed["queued"], len(listed["recent"])) == ([], [], len(PROJECTS))
        assert [job["current"] for job in listed["recent"]] == [BATCH * BATCHES] * len(PROJECTS)
        texts = [text for _, texts in self._answered() for text in texts]
        assert len(texts) == BATCH * BATCHES * len(PROJECTS)
        computed = self._service.get("/stats")["texts_computed"]
        assert self._cached(texts) == len(texts)
        assert self._service.get("/stats")["texts_computed"] == computed
        self._service.assert_healthy()


@pytest.mark.timeout(600)
@pytest.mark.nightly
def test_no_job_is_lost_and_none_is_stuck(new_service: NewService) -> None:
    chance = random.Random(21)
    service = new_service({"JOBS_MAX_ACTIVE": "1", "CACHE_MAX_BYTES": "100000000"})
    serving = Event()
    service.start()
    indexers = [Indexer(service, serving, project, BATCHES) for project in PROJECTS]
    lives = JobLives(service, serving, indexers, chance)
    service.kill()
    early = set(chance.sample(range(KILLS), KILLS_WHILE_STARTING))
    with ThreadPoolExecutor(len(PROJECTS)) as threads:
        running = [threads.submit(indexer.run) for indexer in indexers]
        for number in range(KILLS):
            if number in early:
                lives.kill_while_starting()
            else:
                lives.begin()
                lives.kill_at_work(KILLS - number)
        lives.begin()
        for future in running:
            future.result()
    lives.assert_ended()
