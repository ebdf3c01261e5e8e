"""Tailscale and Docker as they are on this machine. Asks, changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from deployment.commands import ask, ask_json


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
        found = self.status.get("MagicDNSSuffix") or (self.status.get("CurrentTailnet") or {}).get("MagicDNSSuffix")
        return str(found) if found else None

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
        return next((found["/"].get("Proxy") for found in handlers if "/" in found), None)


@dataclass(frozen=True)
class Docker:
    """The container engine."""

    path: str | None
    answered: str
    """Empty, or why it cannot be used."""
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
        """Whether the image need not be pulled."""
        return ask("docker", "image", "inspect", image).returncode == 0

    def mounted(self, folder: str) -> str | None:
        """The folder of this machine that the container sees as `folder`."""
        mounts = (self.container or {}).get("Mounts") or []
        found = (mount.get("Source") for mount in mounts if mount.get("Destination") == folder)
        return next((source for source in found if source), None)
