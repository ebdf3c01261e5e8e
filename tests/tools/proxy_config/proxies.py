"""HAProxy and nginx as Debian has them, on the configurations that `vecmill proxy-config` writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.faults.service import until
from tests.servers import free_port
from vecmill.__main__ import cli

KINDS = ("haproxy", "nginx")
PATIENCE = 10.0  # seconds


def program(kind: str) -> str:
    """Where it is; the test is skipped where it is not. Debian has both outside of some users' PATH."""
    found = shutil.which(kind, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"{kind} is not installed; `make test` installs it where it can: sudo apt install {kind}")
    return found


def written(kind: str, replicas: Sequence[str], *options: str) -> str:
    """What the command prints."""
    named = [word for replica in replicas for word in ("--replica", replica)]
    user = [] if os.getuid() == 0 else ["--run-as", "none"]
    result = CliRunner().invoke(cli, ["proxy-config", kind, *named, *user, *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def command(kind: str, folder: Path, configuration: Path) -> list[str]:
    """That runs it in the foreground."""
    if kind == "haproxy":
        return [program(kind), "-W", "-f", str(configuration)]
    return [
        program(kind), "-p", f"{folder}/", "-c", str(configuration), "-g",
        f"daemon off; pid {folder}/nginx.pid; error_log stderr warn;",
    ]  # fmt: skip


def check(kind: str, folder: Path, text: str) -> str:
    """Have the program check a configuration; what it says where it refuses, empty where it is valid."""
    path = folder / kind
    path.write_text(_in_folder(kind, folder, text))
    words = command(kind, folder, path)
    words = [*words, "-t"] if kind == "nginx" else [words[0], "-c", "-f", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


def _in_folder(kind: str, folder: Path, text: str) -> str:
    """nginx's folders for bodies are root's."""
    if kind == "haproxy":
        return text
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return text.replace("http {\n", "http {\n" + "".join(f"{name}_temp_path {folder}/{name};\n" for name in names), 1)


@dataclass
class Proxy:
    """One that runs."""

    kind: str
    folder: Path
    process: subprocess.Popen[bytes]
    listen: str
    http: httpx.Client

    def reload(self, replicas: Sequence[str], *options: str) -> None:
        """Take up another configuration, as `systemctl reload` does."""
        text = written(self.kind, replicas, "--listen", self.listen, *options)
        (self.folder / self.kind).write_text(_in_folder(self.kind, self.folder, text))
        self.process.send_signal(signal.SIGUSR2 if self.kind == "haproxy" else signal.SIGHUP)

    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "log").read_text()


@contextmanager
def proxy(kind: str, folder: Path, replicas: Sequence[str], *options: str, ready: bool = True) -> Iterator[Proxy]:
    """Runs while the block does, in front of these servers. `ready`: wait until one of them can be reached."""
    # nginx's workers are nobody, and must enter.
    folder.chmod(0o755)
    listen = f"127.0.0.1:{free_port()}"
    path = folder / kind
    path.write_text(_in_folder(kind, folder, written(kind, replicas, "--listen", listen, *options)))
    with (folder / "log").open("wb") as log:
        words = command(kind, folder, path)
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        scheme = "https" if "--tls-certificate" in options else "http"
        with httpx.Client(base_url=f"{scheme}://{listen}", timeout=30, verify=False) as client:
            running = Proxy(kind, folder, process, listen, client)
            until(lambda: _answers(running, ready), PATIENCE)
            yield running
    finally:
        # Both end at once on this signal, and with them their workers.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(running: Proxy, ready: bool) -> bool:
    assert running.process.poll() is None, running.log()
    try:
        return running.http.get("/ready").is_success or not ready
    except httpx.TransportError:
        return False
