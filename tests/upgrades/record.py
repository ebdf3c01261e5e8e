"""Writes the state that a version leaves behind: `python -m tests.upgrades.record SOURCES NAME [--redis]`.

SOURCES is the folder `src` of that version, such as `git archive COMMIT src | tar -x` gives it. Its server embeds some
texts, has an active, a waiting and two ended jobs, ends one batch and is stopped in another; what is then in STATE_DIR
(or Redis) goes to `released/NAME.tar.xz`, with what a client was told. Needs redis-server with `--redis`.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import redis

from tests.redis_server import redis_server
from tests.servers import free_port

RELEASED = Path(__file__).parent / "released"
TEXTS = ["a fox that jumps", "a dog that sleeps", "def add(a, b): return a + b"]
LEFT_OUT = ("lock",)


def dumped(url: str) -> dict[str, dict[str, Any]]:
    """Every key of a Redis: its type, and its value as DUMP gives it."""
    with redis.Redis.from_url(url) as client:
        return {
            key.decode("latin-1"): {"value": base64.b64encode(client.dump(key)).decode(), "expires": client.pttl(key)}
            for key in sorted(client.scan_iter("vecmill:*"))
        }


def line(number: int, text: str) -> str:
    body = {"model": "all-MiniLM-L6-v2", "input": text, "encoding_format": "base64"}
    return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body})


def use(client: httpx.Client) -> dict[str, Any]:
    """What a client does, and what it is told."""

    def post(path: str, **options: Any) -> Any:
        answer = client.post(path, **options)
        answer.raise_for_status()
        return answer.json()

    told: dict[str, Any] = {"vectors": post("/v1/embeddings", json={"model": "all-MiniLM-L6-v2", "input": TEXTS})}
    told["vectors"] = [entry["embedding"] for entry in told["vectors"]["data"]]
    jobs = {}
    for name in ("active", "completed", "failed", "waiting"):
        jobs[name] = post("/jobs", json={"project": name, "total_chunks": 10, "instance_id": "one"})["job_id"]
    for name in ("completed", "failed"):
        post(f"/jobs/{jobs[name]}/progress", json={"current": 4})
    post(f"/jobs/{jobs['completed']}/complete", json={})
    post(f"/jobs/{jobs['failed']}/fail", json={"error": "its client gave up"})
    post(f"/jobs/{jobs['active']}/progress", json={"current": 3})
    told["jobs"] = {name: client.get(f"/jobs/{job_id}").json() for name, job_id in jobs.items()}
    told["batches"] = {}
    for name, lines in (("completed", 3), ("in_progress", 800)):
        content = "\n".join(line(number, f"{TEXTS[number % 3]} {number // 3}") for number in range(lines)) + "\n"
        files = {"file": ("lines.jsonl", content.encode())}
        file_id = post("/v1/files", files=files, data={"purpose": "batch"})["id"]
        wanted = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = post("/v1/batches", json=wanted)
        while name == "completed" and batch["status"] not in ("completed", "failed"):
            time.sleep(0.1)
            batch = client.get(f"/v1/batches/{batch['id']}").json()
        told["batches"][name] = batch
    return told


def record(sources: Path, target: Path, *, with_redis: bool) -> None:
    """Run the server of `sources`, use it, stop it and keep what it leaves."""
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {"STATE_DIR": str(state), "CACHE_MAX_BYTES": "10000000", "MAX_BATCH_TOKENS": "256"}
        url = ""
        if with_redis:
            url = stack.enter_context(redis_server(state / ".."))
            settings["REDIS_URL"] = url
        port = free_port()
        environment = os.environ | settings | {"PYTHONPATH": str(sources), "PORT": str(port), "HOST": "127.0.0.1"}
        server = subprocess.Popen([sys.executable, "-m", "vecmill", "serve"], env=environment)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and server.poll() is None:
            try:
                if client.get("/ready").status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        if server.poll() is not None:
            sys.exit("the server did not start")
        told = use(client)
        time.sleep(0.2)
        server.terminate()
        server.wait(60)
        told["redis"] = dumped(url) if with_redis else None
        (state / "told.json").write_text(json.dumps(told))
        with tarfile.open(target.with_name(f"{target.name}.tar.xz"), "w:xz") as archive:
            for path in sorted(state.iterdir()):
                if path.name not in LEFT_OUT:
                    archive.add(path, path.name)


if __name__ == "__main__":
    record(Path(sys.argv[1]).absolute(), RELEASED / sys.argv[2], with_redis="--redis" in sys.argv[3:])
