"""Two Ray nodes on this machine with the commands of the documentation: `ray start`, `serve deploy`, `serve run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.cluster.ray_cluster import MARK, OBJECT_STORE_BYTES, PATIENT, QUIET, end_all, processes_of
from tests.faults.service import until
from tests.servers import free_port

PROGRAMS = Path(sys.executable).parent
STARTED = b"block forever"
START_WITHIN_S = 300
COMMAND_WITHIN_S = 200
# One replica of 2 CPUs and one front of 1 on each node.
NODE_CPUS = 3
# Workers end themselves where the head is away for so long; Ray's default is a minute.
HEAD_MAY_BE_AWAY_S = 600


class Node:
    """A machine of the cluster: `ray start --block` and what it has started."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as output:
            before = log.stat().st_size
            self._process = subprocess.Popen(command, env={**environment}, stdout=output, stderr=output)
        until(lambda: self._has_started(log, before), START_WITHIN_S)

    def _has_started(self, log: Path, before: int) -> bool:
        text = log.read_bytes()[before:]
        assert self._process.poll() is None, text.decode()[-4000:]
        return STARTED in text

    def processes(self) -> dict[int, str]:
        """All of its processes, each with its title."""
        parents, titles = {}, {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError, IndexError):
                if folder.name.isdecimal():
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    titles[int(folder.name)] = (folder / "cmdline").read_text("utf-8", "replace").replace("\0", " ")
        own = {self._process.pid}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        return {pid: titles.get(pid, "") for pid in own}

    def kill(self) -> None:
        """As a machine that loses its power."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait()


class Nodes:
    """A cluster of a head and another node, whose proxies share one port of this machine."""

    def __init__(self, mark: str, folder: Path, redis: str, settings: Mapping[str, str]) -> None:
        """`mark`: of all its processes. `redis`: host:port of the Redis that the head keeps its state in."""
        self.mark = mark
        self.port = free_port()
        self._folder = folder
        self._gcs, self._dashboard, self._client = free_port(), free_port(), free_port()
        self.environment = {
            **os.environ,
            **QUIET,
            **PATIENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.mark * 2,
            "RAY_REDIS_ADDRESS": redis,
            "RAY_external_storage_namespace": self.mark,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_MAY_BE_AWAY_S),
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs}",
            MARK: self.mark,
            **settings,
        }
        self.head = self.start_head()
        self.worker = self._started("worker", "--address", self.environment["RAY_ADDRESS"])

    def start_head(self) -> Node:
        """Start the head node, at first or again: at the same address."""
        # By this file Ray takes the other node, as it is on the same machine, for a head that runs.
        Path(f"/tmp/r{self.mark[:6]}/ray_current_cluster").unlink(missing_ok=True)
        self.head = self._started(
            "head", "--head", "--port", str(self._gcs), "--dashboard-port", str(self._dashboard),
            "--ray-client-server-port", str(self._client), "--temp-dir", f"/tmp/r{self.mark[:6]}",
        )  # fmt: skip
        return self.head

    def _started(self, name: str, *options: str) -> Node:
        own = ["--block", "--node-ip-address", "127.0.0.1", "--num-cpus", str(NODE_CPUS)]
        command = [str(PROGRAMS / "ray"), "start", *own, "--object-store-memory", str(OBJECT_STORE_BYTES), *options]
        return Node(command, self.environment, self._folder / name)

    def serve(self, *words: str) -> str:
        """Run a command of `serve`; what it prints."""
        done = subprocess.run(
            [str(PROGRAMS / "serve"), *words],
            env=self.environment, capture_output=True, text=True, timeout=COMMAND_WITHIN_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of `serve` that goes on."""
        with (self._folder / "serve").open("ab") as output:
            command = [str(PROGRAMS / "serve"), *words]
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)

    def pids(self, title: str) -> list[int]:
        """The cluster's processes whose title begins so: `ray::ServeReplica:vecmill:embed`."""
        return [pid for pid, its in processes_of(self.mark) if its.startswith(title)]

    def connection(self, node: Node) -> HTTPConnection:
        """A connection to a node's own proxy: opened again until it is, for the kernel gives each to either."""

        def opened() -> HTTPConnection | None:
            proxies = [pid for pid, title in node.processes().items() if title.startswith("ray::ProxyActor")]
            connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
            with suppress(OSError):
                connection.connect()
                sockets = _accepted(self.port, connection.sock.getsockname()[1])
                if any(sockets & _open_files(pid) for pid in proxies):
                    return connection
            connection.close()
            return None

        return until(opened)

    def post(self, path: str, body: object, connection: HTTPConnection, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def _accepted(port: int, client: int) -> set[str]:
    """The sockets of this machine that accepted a connection from a client's port."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        local, remote = (int(words[place].partition(":")[2], 16) for place in (1, 2))
        if (local, remote) == (port, client):
            found.add(f"socket:[{words[9]}]")
    return found


def _open_files(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(str(file.readlink()))
    return found


@contextmanager
def two_nodes(folder: Path, redis: str, settings: Mapping[str, str]) -> Iterator[Nodes]:
    """A head and another node while the block runs."""
    mark, nodes = uuid4().hex, None
    try:
        nodes = Nodes(mark, folder, redis, settings)
        yield nodes
    finally:
        end_all(mark, folder)
        if nodes is not None:
            nodes.head.wait()
            nodes.worker.wait()
