"""A batch of many lines beside the model's own code in a loop: what files, checkpoints and the server take of it."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import httpx
from benchmarks.lib.figures import spread
from benchmarks.lib.minilm import bundled_model
from benchmarks.serving.cache_hits import server

POLL_EVERY_S = 0.25
TIMEOUT_S = 600.0
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class Loop:
    """The model's code alone, in a process of its own."""

    texts: int
    limit_seconds: float
    """Of the matmul beside it."""

    def rate(self, texts: Sequence[str]) -> float:
        """Texts per second over the first of the texts."""
        with NamedTemporaryFile(suffix=".npy") as vectors:
            options = ["--vectors", vectors.name, "--limit-seconds", str(self.limit_seconds)]
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.serving.packed_loop", *options],
                input=json.dumps(list(texts[: self.texts])),
                capture_output=True,
                text=True,
                check=True,
            )
        return min(self.texts, len(texts)) / float(json.loads(ran.stdout.splitlines()[-1])["seconds"])


def measure_batch(
    folder: Path,
    texts: Sequence[str],
    lines: int,
    loop: Loop,
    serve: Sequence[str],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Seconds of the batch from its creation to its end, and by how many percent that is more than its forward passes
    took; the loop's rate on its first texts before and after.
    """
    different = [f"# {number}\n{texts[number % len(texts)]}" for number in range(lines)]
    rates = [loop.rate(different)]
    with (
        server(folder / "state", [bundled_model()], cached=False, serve=serve) as vecmill,
        httpx.Client(base_url=vecmill.url, timeout=TIMEOUT_S) as client,
    ):
        file = _upload(client, different)
        busy = _device_seconds(client)
        started = time.perf_counter()
        ended = _run(client, file, advance)
        seconds = time.perf_counter() - started
        busy = _device_seconds(client) - busy
    rates.append(loop.rate(different))
    counts = ended["request_counts"]
    if counts != {"total": lines, "completed": lines, "failed": 0}:
        raise RuntimeError(f"the batch ended {ended['status']} with {counts}")
    of_loop = [100 * lines / seconds / rate for rate in rates]
    return {
        "lines": lines,
        "seconds": seconds,
        "texts_per_second": lines / seconds,
        "loop_texts_per_second": spread(rates),
        "percent_of_loop": spread(of_loop),
        "forward_seconds": busy,
        "overhead_percent": spread([100 * (seconds / busy - 1)]),
    }


def _upload(client: httpx.Client, texts: Sequence[str]) -> str:
    with NamedTemporaryFile(suffix=".jsonl") as file:
        file.writelines(_lines(texts))
        file.flush()
        with Path(file.name).open("rb") as content:
            answer = client.post("/v1/files", files={"file": content}, data={"purpose": "batch"})
    return str(answer.raise_for_status().json()["id"])


def _lines(texts: Sequence[str]) -> Iterator[bytes]:
    for number, text in enumerate(texts):
        body = {"input": text, "encoding_format": "base64"}
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body}
        yield json.dumps(line).encode() + b"\n"


def _run(client: httpx.Client, file: str, advance: Callable[[int], None]) -> dict[str, Any]:
    wanted = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch: dict[str, Any] = client.post("/v1/batches", json=wanted).raise_for_status().json()
    done = 0
    while batch["status"] not in ENDED:
        time.sleep(POLL_EVERY_S)
        batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        now = (batch["request_counts"] or {}).get("completed", 0)
        advance(now - done)
        done = now
    return batch


def _device_seconds(client: httpx.Client) -> float:
    """The seconds of all forward passes since the server's start."""
    matches = re.findall(r"^vecmill_batch_duration_seconds_sum\{.*\} (\S+)", client.get("/metrics").text, re.M)
    return sum(map(float, matches))
