"""The server is killed again and again while it works through batches."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence

import numpy as np
import pytest

from tests.faults.batch_lines import TOLERANCE, assert_whole, batch_input, create, done, ended, upload
from tests.faults.conftest import NewService
from tests.faults.service import Service, until

KILLS = 30
KILLS_WHILE_STARTING = 3
CHUNK = 16
# At one time, so that at each kill some of them are about to write something down.
BATCHES = ("a", "b", "c", "d")
LINES = 1500  # of each
AT_WORK = ("validating", "in_progress", "finalizing")


class BatchLives:
    """Batches over many processes, each of which is killed at a random moment."""

    def __init__(self, service: Service, batch_ids: Sequence[str], chance: random.Random) -> None:
        self._service = service
        self._batch_ids = batch_ids
        self._chance = chance
        self._done = dict.fromkeys(batch_ids, 0)
        self._completed = 0
        self.killed_at_work = 0

    def kill_at_work(self, lives_left: int) -> None:
        """Start the server, let it do at most its share of the remaining lines, and kill it within 30 ms."""
        log_length = len(self._service.log())
        self._service.start()
        completed_before = sum(self._began_with(batch_id, log_length) for batch_id in self._batch_ids)
        working = self._look()
        before = sum(self._done.values())
        goal = before + self._chance.randint(0, (LINES * len(BATCHES) - before) // (lives_left + 1))
        while sum(self._done.values()) < goal:
            computed = self._service.get("/stats")["texts_computed"]
            working = self._look()
            # Texts that one process computes but does not commit are computed again by the next.
            assert computed <= self._completed - completed_before + CHUNK * len(BATCHES)
        self.killed_at_work += working
        time.sleep(self._chance.uniform(0.0, 0.03))
        self._service.kill()

    def kill_while_starting(self) -> None:
        """Start the server and kill it before it is ready, or just when it becomes ready."""
        self._service.launch()
        latest = time.monotonic() + self._chance.uniform(0.2, 3.0)
        while time.monotonic() < latest and not self._service.is_ready():
            time.sleep(0.01)
        self._service.kill()

    def _began_with(self, batch_id: str, log_start: int) -> int:
        """Completed lines of a batch when the present process took it up, as its log says from `log_start` on; all that
        it has where it had ended before."""
        begins = re.compile(rf"batch begins batch={batch_id} .*completed=(\d+)")

        def completed() -> str | None:
            if found := begins.search(self._service.log(), log_start):
                return found[1]
            batch = self._service.get(f"/v1/batches/{batch_id}")
            return None if batch["status"] in AT_WORK else str(batch["request_counts"]["completed"])

        return int(until(completed))

    def _look(self) -> bool:
        """Note how far the batches are, which never decreases. True while any of them is in progress."""
        batches = [self._service.get(f"/v1/batches/{batch_id}") for batch_id in self._batch_ids]
        for batch in batches:
            assert done(batch) >= self._done[batch["id"]]
            self._done[batch["id"]] = done(batch)
        self._completed = sum(batch["request_counts"]["completed"] for batch in batches)
        return any(batch["status"] in AT_WORK for batch in batches)


@pytest.mark.timeout(600)
@pytest.mark.nightly
def test_no_line_is_lost_or_there_twice(new_service: NewService) -> None:
    chance = random.Random(20)
    service = new_service({"BATCH_CHUNK_SIZE": str(CHUNK), "CACHE_MAX_BYTES": "0", "BATCHES_MAX_ACTIVE": "4"})
    service.start()
    files = [upload(service, batch_input(LINES, name)) for name in BATCHES]
    unharmed = [create(service, file_id) for file_id in files]
    expected = [assert_whole(service, ended(service, batch_id), LINES) for batch_id in unharmed]
    batch_ids = [create(service, file_id) for file_id in files]
    lives = BatchLives(service, batch_ids, chance)
    service.kill()
    early = set(chance.sample(range(KILLS), KILLS_WHILE_STARTING))
    for number in range(KILLS):
        if number in early:
            lives.kill_while_starting()
        else:
            lives.kill_at_work(KILLS - number)
    assert lives.killed_at_work == KILLS - KILLS_WHILE_STARTING
    service.start()
    for batch_id, vectors in zip(batch_ids, expected, strict=True):
        answered = assert_whole(service, ended(service, batch_id), LINES, KILLS)
        for number, vector in answered.items():
            np.testing.assert_allclose(vector, vectors[number], rtol=0, atol=TOLERANCE)
    # The inputs, and two for each batch: nothing is left over.
    assert len(service.get("/v1/files")["data"]) == len(files) + 2 * (len(unharmed) + len(batch_ids))
    service.assert_healthy()
