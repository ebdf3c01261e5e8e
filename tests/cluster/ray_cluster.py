"""A Ray cluster of one machine with vecmill on it, for a test: a process, ended with all that it started.

Run as a program, it is that process: `python -m tests.cluster.ray_cluster PORT FOLDER ARGUMENTS`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from tests.servers import free_port

ARGUMENTS = "arguments.json"
UP = "the cluster is up"
MARK = "VECMILL_TEST_CLUSTER"
HOOK = "VECMILL_TEST_HOOK"
"""A function that each of Ray's processes calls at its start, if any: `module.name`."""
START_WITHIN_S = 400
ATTEMPTS = 5
OBJECT_STORE_BYTES = 200_000_000
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_worker_niceness": "0"}
# Ray takes its own processes for dead where they are slow to start, as on a machine that has much else to do.
PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_worker_register_timeout_seconds": "120",
    "RAY_health_check_timeout_ms": "60000",
}


def processes_of(mark: str) -> Iterator[tuple[int, str]]:
    """All processes of a cluster, each with its title."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and _has(folder, mark):
                yield int(folder.name), (folder / "cmdline").read_text("utf-8", "replace").replace("\0", " ")


def _has(process: Path, mark: str) -> bool:
    """Whether a process is of this cluster. Some of Ray's write their title over their environment."""
    if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
        return True
    return any(str(file.readlink()).startswith(f"/tmp/r{mark[:6]}") for file in (process / "fd").iterdir())


def end_all(mark: str, kept: Path) -> None:
    """End all processes of a cluster, and keep its logs in a folder."""
    for pid, _ in list(processes_of(mark)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for folder in Path("/tmp").glob(f"r{mark[:6]}*"):
        with suppress(OSError, shutil.Error):
            shutil.copytree(folder / "session_latest/logs/serve", kept / f"serve-{folder.name}")
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RunningCluster:
    """Where it answers, and which processes it has."""

    url: str
    mark: str
    process: subprocess.Popen[bytes]
    log: Path

    def replicas(self, deployment: str = "models") -> list[int]:
        """The processes of a deployment's replicas."""
        title = f"ray::ServeReplica:default:{deployment}"
        return [pid for pid, its in processes_of(self.mark) if its.startswith(title)]

    def redeploy(self, arguments: Mapping[str, Any]) -> None:
        """Deploy with other arguments, which replaces the replicas one after another."""
        (self.log.parent / ARGUMENTS).write_text(json.dumps(dict(arguments)))
        self.process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """End all processes."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        end_all(self.mark, self.log.parent)
        self.process.wait()


@contextmanager
def ray_cluster(
    folder: Path,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] = {},
    ready_path: str = "/ready",
    answering: int | None = None,
) -> Iterator[RunningCluster]:
    """A cluster while the block runs; `arguments` are those of `vecmill.cluster.application.Cluster`.

    `answering`: the port where it answers, if not that of Ray's proxy.
    """
    port, mark, log = free_port(), uuid4().hex, folder / "cluster.log"
    settings = {
        "DEVICE": "cpu",
        "RERANK_MODEL": "none",
        "MAX_BATCH_TOKENS": "256",  # warm-up runs the largest
        "STATE_DIR": str(folder / "state"),
        **environment,
    }
    command = [sys.executable, "-m", "tests.cluster.ray_cluster", str(port), str(folder), json.dumps(dict(arguments))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **QUIET, **PATIENT, **settings, MARK: mark}, stdout=output, stderr=output
        )
        cluster = RunningCluster(f"http://127.0.0.1:{answering or port}", mark, process, log)
        try:
            _wait(cluster, ready_path)
            yield cluster
        finally:
            cluster.end()


def _wait(cluster: RunningCluster, path: str) -> None:
    until = time.monotonic() + START_WITHIN_S
    while time.monotonic() < until:
        assert cluster.process.poll() is None, cluster.log.read_text("utf-8", "replace")[-4000:]
        with suppress(httpx.HTTPError):
            if (
                httpx.get(cluster.url + path, timeout=5).status_code in (200, 503)
                and UP.encode() in cluster.log.read_bytes()
            ):
                return
        time.sleep(0.2)
    raise AssertionError(cluster.log.read_text("utf-8", "replace")[-4000:])


def _start_ray() -> None:
    """Ray gives its own processes 30 seconds, which are over soon on a machine that has much else to do."""
    import ray

    hook = os.environ.get(HOOK)
    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                num_cpus=16,  # more than there are: replicas that wait for requests need none
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                namespace="serve",
                runtime_env={"worker_process_setup_hook": hook} if hook else None,
                _temp_dir=f"/tmp/r{os.environ[MARK][:6]}{attempt}",  # its sockets' paths may have 107 characters
            )
            return
        except Exception:
            ray.shutdown()
            if attempt + 1 == ATTEMPTS:
                raise


def main(port: str, folder: str, arguments: str) -> None:
    """Run the cluster until SIGTERM."""
    import ray
    from ray import serve

    from vecmill.cluster import build

    _start_ray()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    given = json.loads(arguments)
    serve.run(build(given))
    sys.stdout.write(f"{UP}\n")
    sys.stdout.flush()
    again: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: again.append(number))
    while not stopped:
        time.sleep(0.1)
        if again:
            again.clear()
            application = build(json.loads((Path(folder) / ARGUMENTS).read_text()))
            with suppress(RuntimeError):  # it ends so where a replica dies meanwhile, which Ray replaces
                serve.run(application)
    with suppress(Exception):
        serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4])
