"""What systemd, the driver, Tailscale and Docker report. Changes nothing; works without root, then knowing less."""

from __future__ import annotations

import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployment import files
from deployment.console import ask, ask_json
from deployment.layout import Layout

MARK = "# Written by deploy.py of vecmill."
PROPERTIES = (
    "LoadState,ActiveState,SubState,UnitFileState,InvocationID,NRestarts,ActiveEnterTimestamp,Result,NeedDaemonReload,"
    "Job"
)


@dataclass(frozen=True)
class Unit:
    """A unit as systemd knows it, and its file."""

    name: str
    path: Path
    properties: dict[str, str]

    @property
    def active(self) -> str:
        """`active`, `activating`, `inactive`, `failed`, ..."""
        return self.properties.get("ActiveState", "unknown")

    @property
    def runs(self) -> bool:
        return self.active in ("active", "activating", "reloading")

    @property
    def queued(self) -> bool:
        """Whether systemd is about to do something with it."""
        return self.properties.get("Job", "0") not in ("", "0")

    @property
    def ended(self) -> bool:
        """Whether it does not run and will not start by itself, or only because it failed."""
        return (self.active in ("failed", "inactive") and not self.queued) or (
            self.properties.get("SubState") == "auto-restart"
        )

    @property
    def exists(self) -> bool:
        return files.exists(self.path) or self.properties.get("LoadState", "not-found") not in ("not-found", "")

    @property
    def enabled(self) -> bool:
        return self.properties.get("UnitFileState") == "enabled"

    @property
    def ours(self) -> bool:
        """Whether deploy.py wrote it."""
        return (files.text(self.path) or "").startswith(MARK)

    @property
    def foreign(self) -> bool:
        """Whether somebody else did: the guide that this replaces has a unit of the same name."""
        return files.text(self.path) is not None and not self.ours


@dataclass(frozen=True)
class Systemd:
    """systemctl of the system or of the user."""

    layout: Layout

    def command(self, *words: str) -> tuple[str, ...]:
        return ("systemctl", *(["--user"] if self.layout.user else []), *words)

    def unit(self, name: str) -> Unit:
        """The state of a unit now."""
        answered = ask(*self.command("show", f"--property={PROPERTIES}", name))
        lines = (line.partition("=") for line in answered.stdout.splitlines())
        return Unit(
            name, self.layout.real(self.layout.units / name), {key: value for key, equals, value in lines if equals}
        )

    def journal(self, *words: str) -> tuple[str, ...]:
        return ("journalctl", *(["--user"] if self.layout.user else []), *words)


def gpu(layout: Layout) -> str | None:
    """The GPU's name, as far as the driver tells."""
    listed = ask("nvidia-smi", "-L").stdout if shutil.which("nvidia-smi") else ""
    if match := re.search(r"GPU \d+: (.*?) \(UUID", listed):
        return match[1]
    return "an NVIDIA GPU" if layout.real(Path("/proc/driver/nvidia/version")).exists() else None


# As Triton looks for one, and as torch does for a CPU.
C_COMPILERS, CPP_COMPILERS = ("gcc", "clang"), ("g++", "c++", "clang++")
WHAT_HEADERS = (
    "import os, sysconfig; print(sysconfig.get_python_version(), "
    "os.path.isfile(os.path.join(sysconfig.get_paths()['include'], 'Python.h')))"
)


def missing_to_compile(python: str, *, on_gpu: bool) -> list[str]:
    """The packages that torch.compile lacks: a compiler, and the headers of the Python that the release is made of."""
    compilers, package = (C_COMPILERS, "gcc") if on_gpu else (CPP_COMPILERS, "g++")
    missing = [] if any(map(shutil.which, compilers)) else [package]
    version, _, there = ask(python, "-c", WHAT_HEADERS).stdout.strip().partition(" ")
    return [*missing, f"python{version}-dev"] if there == "False" else missing


def listen_error(host: str, port: int) -> str | None:
    """Why nothing can listen on this address and port now; None if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, ValueError, TypeError) as error:  # the latter are of what is no name of a host
            return getattr(error, "strerror", None) or str(error)
    return None


@dataclass(frozen=True)
class Tailscale:
    """The tailnet as this machine sees it."""

    installed: bool
    status: dict[str, Any]
    served: dict[str, Any]
    """What `tailscale serve` hosts, by service: `svc:name`."""

    @classmethod
    def look(cls) -> Tailscale:
        if shutil.which("tailscale") is None:
            return cls(False, {}, {})
        served = ask_json("tailscale", "serve", "status", "--json") or {}
        return cls(True, ask_json("tailscale", "status", "--json") or {}, served.get("Services") or {})

    @property
    def running(self) -> bool:
        return self.status.get("BackendState") == "Running"

    @property
    def tagged(self) -> bool:
        return bool((self.status.get("Self") or {}).get("Tags"))

    @property
    def suffix(self) -> str | None:
        """`tail1234.ts.net`"""
        suffix = self.status.get("MagicDNSSuffix") or (self.status.get("CurrentTailnet") or {}).get("MagicDNSSuffix")
        return str(suffix) if suffix else None

    @property
    def https(self) -> bool:
        return bool(self.status.get("CertDomains"))

    def name(self, service: str) -> str | None:
        """The service's name in the tailnet."""
        return f"{service}.{self.suffix}" if self.running and self.suffix else None

    def target(self, service: str) -> str | None:
        """Where the service's HTTPS goes, where this machine hosts it."""
        web = (self.served.get(f"svc:{service}") or {}).get("Web") or {}
        handlers = [entry.get("Handlers") or {} for name, entry in web.items() if name.endswith(":443")]
        return next((handler["/"].get("Proxy") for handler in handlers if "/" in handler), None)


@dataclass(frozen=True)
class Docker:
    """The container engine."""

    path: str | None
    answered: str
    """Empty, or the error of `docker info`."""
    nvidia: bool
    container: dict[str, Any] | None
    """A container named qmd-vllm, whoever made it."""

    @classmethod
    def look(cls, container: str) -> Docker:
        path = shutil.which("docker")
        if path is None:
            return cls(None, "", False, None)
        answered = ask("docker", "info", "--format", "{{json .}}")
        if answered.returncode != 0:
            return cls(path, answered.stderr.strip() or f"docker info ended with {answered.returncode}", False, None)
        tools = any(shutil.which(tool) for tool in ("nvidia-container-runtime-hook", "nvidia-ctk"))
        return cls(
            path, "", tools or "nvidia" in answered.stdout, ask_json("docker", "container", "inspect", container)
        )

    def has(self, image: str) -> bool:
        """Whether the image is on this machine already."""
        return ask("docker", "image", "inspect", image).returncode == 0

    def mounted(self, folder: str) -> str | None:
        """The folder of this machine that the container sees as `folder`."""
        mounts = (self.container or {}).get("Mounts") or []
        sources = (mount.get("Source") for mount in mounts if mount.get("Destination") == folder)
        return next((source for source in sources if source), None)
