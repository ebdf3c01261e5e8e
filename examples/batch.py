#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx2", "numpy"]
# ///
"""Embed the lines of a text file as a batch that the server works through by itself: `POST /v1/files`, `/v1/batches`.

The calls are those of OpenAI's batch API. The batch goes on when this script ends, and when the server is restarted: to
wait for one of before, give its id. `vecmill embed` does the same for files of any size. Needs httpx2 and numpy, which
vecmill is installed with; nothing of vecmill itself.

    vecmill serve &
    python examples/batch.py notes.txt vectors.npy
    python examples/batch.py notes.txt vectors.npy --batch batch_6835...
"""

import argparse
import json
import sys
import time
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

ANSWER_S = 120.0
POLL_S = 0.5
RUNNING = ("validating", "in_progress", "finalizing")


class BatchError(Exception):
    """What went wrong, in one sentence for the person at the terminal."""


def call(http: httpx2.Client, method: str, path: str, **arguments: Any) -> httpx2.Response:
    """One call, answered with success."""
    try:
        answer = http.request(method, path, **arguments)
    except httpx2.TransportError as error:
        raise BatchError(
            f"No server answers at {http.base_url} ({error}); start `vecmill serve` or name one with --url."
        ) from error
    if not answer.is_success:
        raise BatchError(f"{method} {path} was answered with status {answer.status_code}: {answer.text[:300]}")
    return answer


def start(http: httpx2.Client, texts: Sequence[str]) -> str:
    """Upload a request for each text and have them worked through; the batch's id."""
    lines = [
        {
            "custom_id": str(index),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"input": text, "encoding_format": "base64"},
        }
        for index, text in enumerate(texts)
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    file = call(http, "POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("requests.jsonl", content)})
    body = {"input_file_id": file.json()["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    return str(call(http, "POST", "/v1/batches", json=body).json()["id"])


def finished(http: httpx2.Client, batch_id: str) -> dict[str, Any]:
    """The batch when it has ended; how far it is goes to stderr."""
    while True:
        batch: dict[str, Any] = call(http, "GET", f"/v1/batches/{batch_id}").json()
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        print(f"\r{batch['status']}: {done} of {counts['total']} texts", end="", file=sys.stderr, flush=True)
        if batch["status"] not in RUNNING:
            print(file=sys.stderr)
            return batch
        time.sleep(POLL_S)


def vectors_of(http: httpx2.Client, batch: dict[str, Any], texts: int) -> np.ndarray:
    """The vectors in order of the texts, float32, shape (texts, dimensions); the output's lines come in any order."""
    if batch["status"] != "completed" or batch["request_counts"]["failed"]:
        raise BatchError(f"The batch {batch['id']} is {batch['status']}: {batch['request_counts']} {batch['errors']}")
    rows: list[np.ndarray | None] = [None] * texts
    output = call(http, "GET", f"/v1/files/{batch['output_file_id']}/content").text
    for line in map(json.loads, output.splitlines()):
        embedding = line["response"]["body"]["data"][0]["embedding"]
        rows[int(line["custom_id"])] = np.frombuffer(b64decode(embedding), "<f4")
    found = [row for row in rows if row is not None]
    if len(found) != texts:
        raise BatchError(
            f"The batch {batch['id']} has {len(found)} vectors and the file {texts} lines: another file's?"
        )
    return np.stack(found)


def run(options: argparse.Namespace) -> None:
    """Start or take up the batch, wait, write the vectors."""
    texts = [line for line in options.file.read_text("utf-8").splitlines() if line.strip()]
    if not texts:
        raise BatchError(f"There is no text in {options.file}.")
    with httpx2.Client(base_url=options.url, timeout=ANSWER_S) as http:
        batch_id = options.batch or start(http, texts)
        print(f"batch {batch_id}; after Ctrl-C, --batch {batch_id} waits for it again", file=sys.stderr)
        vectors = vectors_of(http, finished(http, batch_id), len(texts))
    np.save(options.output, vectors)
    print(f"wrote {options.output}: {vectors.shape[0]} vectors of {vectors.shape[1]} values")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1 with one sentence on stderr if not, 130 if interrupted."""
    parser = argparse.ArgumentParser(description="Embed a text file's lines as a batch of a vecmill server.")
    parser.add_argument("file", type=Path, help="a text file with a text on each line")
    parser.add_argument("output", type=Path, help="the .npy file of vectors")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server (default: %(default)s)")
    parser.add_argument("--batch", metavar="ID", help="wait for this batch, started before")
    try:
        run(parser.parse_args(arguments))
    except (BatchError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the server goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
