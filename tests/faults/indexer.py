"""A client that indexes as CodeCartographer does, and sends what got no answer again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Event
from typing import Any

import httpx

from tests.faults.service import LOOK_EVERY, PATIENCE, Service, succeeded

BATCH = 16  # texts
CONFLICT = 409


class Indexer:
    """Runs one job from its registration to its end, and notes what the server acknowledged and must not lose."""

    def __init__(self, service: Service, serving: Event, project: str, batches: int) -> None:
        """`serving` is set while there is a server to send to."""
        self._http = httpx.Client(base_url=service.url, timeout=PATIENCE)
        self._serving = serving
        self._batches = [[f"{project} {number} {n}" for n in range(BATCH)] for number in range(batches)]
        registration = {"project": project, "total_chunks": BATCH * batches, "instance_id": f"codecart-{project}"}
        self.id = str(succeeded(self._http.post("/jobs", json=registration))["job_id"])
        self.answered: list[tuple[float, Sequence[str]]] = []
        """When an answer came, by the monotonic clock, and to which texts."""
        self.acknowledged = 0
        """Chunks reported."""
        self.completed = False

    def run(self) -> None:
        """Wait for the turn, embed, report, complete."""
        while self._request("GET", f"/jobs/{self.id}")["status"] == "queued":
            time.sleep(LOOK_EVERY)
        for number, texts in enumerate(self._batches, 1):
            answer = self._answer("POST", "/embed", {"inputs": texts, "is_query": False})
            assert len(succeeded(answer)) == BATCH
            self.answered.append((time.monotonic(), texts))
            job = self._request("POST", f"/jobs/{self.id}/progress", {"current": number * BATCH})
            assert (job["status"], job["current"]) == ("active", number * BATCH)
            self.acknowledged = number * BATCH
        self._complete()
        self._http.close()

    def _complete(self) -> None:
        answer = self._answer("POST", f"/jobs/{self.id}/complete")
        if answer.status_code == CONFLICT:  # done before the answer was lost
            answer = self._answer("GET", f"/jobs/{self.id}")
        assert succeeded(answer)["status"] == "completed"
        self.completed = True

    def _request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        answer: dict[str, Any] = succeeded(self._answer(method, path, body))
        return answer

    def _answer(self, method: str, path: str, body: object = None) -> httpx.Response:
        while True:
            assert self._serving.wait(PATIENCE)
            try:
                return self._http.request(method, path, json=body, headers={"X-Job-ID": self.id})
            except httpx.TransportError:  # it was killed
                time.sleep(LOOK_EVERY)
