"""A machine in a folder: deploy.py runs as a process of its own, with DESTDIR for `/` and fake programs on its PATH."""

from __future__ import annotations

import json
import os
import pty
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.servers import free_port

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = (
    *("systemctl", "tailscale", "docker", "nvidia-smi", "python", "gcc"),
    *("getent", "useradd", "userdel", "loginctl", "journalctl"),
)
LOOKS = (
    *("systemctl show", "systemctl --user show", "tailscale status", "tailscale serve status", "tailscale debug"),
    *("docker info", "docker image inspect", "docker container inspect", "nvidia-smi", "getent", "journalctl"),
)
WITHIN_S = 60


def _clone(folder: Path) -> Path:
    """As much of the repository as deploying needs; what tests change in it is theirs."""
    (folder / "src/vecmill").mkdir(parents=True)
    (folder / "locks").mkdir()
    locks = [f"locks/{name}.txt" for name in ("torch", "server", "build")]
    declared = ("pyproject.toml", *locks, "requirements-bundled.txt")
    for name in ("deploy.py", *declared, "src/vecmill/__init__.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / "deployment").symlink_to(REPOSITORY / "deployment")
    return folder


def _program(path: Path, call: str) -> None:
    """A program that does `call`, a function of a module beside this one; it starts fast."""
    here, module = Path(__file__).parent, call.replace("sys.exit(", "").partition(".")[0]
    path.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(here)!r})\nimport {module}\n{call}\n")
    path.chmod(0o755)


class World:
    """What is on the machine can be set before, and read after."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.home = Path("/home/ann")
        self.usual: tuple[str, ...] = ()
        """Options of every `deploy`."""
        self.port, self.vllm_port = free_port(), free_port()
        self.clone = _clone(folder / "clone")
        self._folder = folder / "fake"
        self._bin = self._folder / "bin"
        self._bin.mkdir(parents=True)
        (self.root / "run/systemd/system").mkdir(parents=True)
        _program(self._folder / "server", "fake_service.serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])")
        _program(self._folder / "launcher", "sys.exit(fake.main(sys.argv[0].rpartition('/')[2], sys.argv[1:]))")
        for program in PROGRAMS:
            (self._bin / program).symlink_to(self._folder / "launcher")
        self.set(
            units={},
            broken=[],
            failures=[],
            accounts=[],
            images=[],
            container=None,
            served={},
            operator="",
            journal="",
            loading=3,
            started=0,
            tailscale={
                "BackendState": "Running",
                "MagicDNSSuffix": "tail1234.ts.net",
                "CertDomains": ["spark.tail1234.ts.net"],
                "Self": {"Tags": ["tag:server"]},
            },
        )

    @property
    def environment(self) -> dict[str, str]:
        """What deploy.py sees; nothing of whoever runs the tests."""
        return {
            "PATH": str(self._bin),
            "DESTDIR": str(self.root),
            "FAKE": str(self._folder),
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": "/run/user/1000",
        }

    @property
    def account(self) -> str:
        """Who runs the tests, and so deploy.py."""
        return pwd.getpwuid(os.geteuid()).pw_name

    @property
    def python(self) -> Path:
        """The interpreter to deploy with."""
        return self._bin / "python"

    @property
    def state(self) -> dict[str, Any]:
        """What the fake programs remember."""
        path = self._folder / "state.json"
        state: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return state

    def set(self, **state: object) -> None:
        (self._folder / "state.json").write_text(json.dumps({**self.state, **state}), "utf-8")

    def fail(self, at: str, code: int = 1, **more: object) -> None:
        """Make calls whose command line contains `at` end with `code` and write `stderr` and `stdout`."""
        self.set(failures=[{"at": at, "code": code, **more}])

    def mend(self) -> None:
        self.set(failures=[], broken=[])

    def without(self, program: str) -> None:
        """Remove a program from the machine."""
        (self._bin / program).unlink()

    def command(self, *options: str) -> list[str]:
        """deploy.py's command line, without `site`, as it needs the standard library alone."""
        return [sys.executable, "-S", str(self.clone / "deploy.py"), *options]

    def deploy(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`deploy.py` to its end, on free ports and with the fake Python."""
        arguments = [*options, *self._chosen(options)]
        return self.run(*arguments)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`deploy.py` with these options and no others."""
        return subprocess.run(
            self.command(*options), env=self.environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
        )

    def in_a_terminal(self, *options: str) -> str:
        """The same where a person looks on: all that is written."""
        ours, theirs = pty.openpty()
        command = self.command(*options, *self._chosen(options))
        with os.fdopen(ours, "rb", 0) as terminal:
            process = subprocess.Popen(command, env=self.environment, stdout=theirs, stderr=theirs)
            os.close(theirs)
            shown = b""
            with suppress(OSError):  # how a terminal ends
                while piece := terminal.read(4096):
                    shown += piece
            assert process.wait(WITHIN_S) == 0
        return shown.decode()

    def _chosen(self, options: Sequence[str]) -> list[str]:
        vllm_only = options[:1] == ("vllm",)
        ports = ["--port", str(self.vllm_port if vllm_only else self.port)]
        if not vllm_only and options[:1] != ("embed",):
            ports += ["--vllm-port", str(self.vllm_port)]
        return [*ports, "--python", str(self.python), *self.usual]

    def interrupt(self, at: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Ctrl-C while the call whose line holds `at` is running."""
        self.fail(at, hangs=True)
        process = subprocess.Popen(
            self.command(*options, *self._chosen(options)),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + WITHIN_S
        while not (self._folder / "hanging").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WITHIN_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self) -> list[str]:
        """Every call so far, as one would type it."""
        path = self._folder / "calls"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [shlex.join(json.loads(line)) for line in lines]

    def changes(self) -> list[str]:
        """The calls that change something, and forget all calls."""
        made = [call for call in self.calls() if not call.startswith((*LOOKS, f"{self.python} -c"))]
        (self._folder / "calls").unlink(missing_ok=True)
        return made

    def snapshot(self) -> dict[str, tuple[int, int, str]]:
        """Everything on the machine: mode, time of change, content or target."""
        entries = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_text("utf-8") if path.is_file() else ""
            entries[str(path.relative_to(self.root))] = (status.st_mode, status.st_mtime_ns, content)
        return entries

    def text(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text("utf-8")

    def close(self) -> None:
        """End the services that still run."""
        pids = self._folder / "pids"
        for pid in pids.read_text("utf-8").split() if pids.exists() else ():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
