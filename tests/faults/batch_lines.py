"""The input of a batch, some of whose lines are refused, and its answers looked at line by line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.faults.service import Service, succeeded, until

URL = "/v1/embeddings"
REFUSED_EVERY = 50  # lines
TOLERANCE = 1e-5  # the other texts of a forward pass change the last bits


def batch_input(lines: int, name: str = "text") -> bytes:
    """Lines whose custom_ids are their numbers, from 0."""
    return b"".join(_line(number, name) for number in range(lines))


def is_refused(number: int) -> bool:
    """Whether the route refuses this line, because it asks for dimensions that the model does not have."""
    return number % REFUSED_EVERY == 7


def _line(number: int, name: str) -> bytes:
    body: dict[str, Any] = {"model": "m", "input": f"{name} {number}", "encoding_format": "float"}
    if is_refused(number):
        body["dimensions"] = 7
    return json.dumps({"custom_id": str(number), "method": "POST", "url": URL, "body": body}).encode() + b"\n"


def upload(service: Service, content: bytes) -> str:
    """The id of a new file."""
    sent = service.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("input.jsonl", content)})
    return str(succeeded(sent)["id"])


def create(service: Service, file_id: str) -> str:
    """The id of a new batch."""
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    return str(service.post("/v1/batches", body)["id"])


def ended(service: Service, batch_id: str) -> dict[str, Any]:
    """A batch, once it has ended."""

    def look() -> dict[str, Any] | None:
        batch: dict[str, Any] = service.get(f"/v1/batches/{batch_id}")
        return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None

    return until(look)


def done(batch: dict[str, Any]) -> int:
    """Lines that are on disk."""
    counts = batch["request_counts"]
    return int(counts["completed"] + counts["failed"])


def assert_whole(service: Service, batch: dict[str, Any], lines: int, kills: int = 0) -> dict[int, np.ndarray]:
    """Check that every line is in one of the files, once, in order. Returns the vectors of lines not refused, by line.

    At most one line for each of the `kills` may have failed: one that ran alone at a kill is not run again.
    """
    assert batch["status"] == "completed", batch
    output, failed = (_content(service, batch[f"{kind}_file_id"]) for kind in ("output", "error"))
    killers = [line["custom_id"] for line in failed if line["error"]]
    errors = [line for line in failed if not line["error"]]
    assert {line["error"]["code"] for line in failed if line["error"]} <= {"process_died"}
    assert len(killers) <= kills
    ran = [number for number in range(lines) if str(number) not in killers]
    assert [line["custom_id"] for line in output] == [str(number) for number in ran if not is_refused(number)]
    assert [line["custom_id"] for line in errors] == [str(number) for number in ran if is_refused(number)]
    assert batch["request_counts"] == {"total": lines, "completed": len(output), "failed": len(failed)}
    assert {line["response"]["status_code"] for line in output} == {200}
    assert {line["response"]["status_code"] for line in errors} == {400}
    assert len({line["id"] for line in (*output, *failed)}) == lines
    return {int(line["custom_id"]): np.array(line["response"]["body"]["data"][0]["embedding"]) for line in output}


def _content(service: Service, file_id: str) -> Sequence[dict[str, Any]]:
    answer = service.http.get(f"/v1/files/{file_id}/content")
    assert answer.is_success, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]
