"""What the command line asked for, and where everything lies, for the whole system or for one user."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

EMBED, VLLM = "qmd-embed", "qmd-vllm"
SERVICES = {"embed": EMBED, "vllm": VLLM}

IMAGE = "nvcr.io/nvidia/vllm:26.05.post1-py3@sha256:94e21552f644e0c1627464ba89d2f7a4ce7442e196f72afa0bb5d7fba23cbb03"
MODEL = "Qwen/Qwen3-4B"
PORT, VLLM_PORT = 8001, 8000
UNSET_PORT = 8080  # the server's own, where an env file names none
WAIT_S = 3600.0


@dataclass(frozen=True)
class Options:
    """Defaults deploy both services for the whole system."""

    services: tuple[str, ...] = (EMBED, VLLM)
    named: bool = False
    """Whether the user named the service."""
    action: str = "deploy"
    dry_run: bool = False
    user: bool = False
    tailscale: bool = True
    host: str | None = None
    port: int | None = None
    api_key_file: Path | None = None
    embed_model: str | None = None
    rerank_model: str | None = None
    vllm_model: str | None = None
    image: str | None = None
    vllm_port: int | None = None
    purge: bool = False
    lines: int = 100
    wait: float = WAIT_S
    python: str = sys.executable


ACCOUNT = "vecmill"
EMBED_UNIT = "qmd-embed.service"
VLLM_UNIT = "qmd-vllm.service"


@dataclass(frozen=True)
class Layout:
    """Paths as the services see them; `real` gives where they are written.

    `root` is DESTDIR: a folder that stands for `/`, as packagers and tests use it.
    """

    root: Path
    home: Path | None
    """Home of the user whose services they are; None for the system's."""

    @classmethod
    def of(cls, user: bool) -> Layout:
        """The layout of this process: DESTDIR and HOME count."""
        root = Path(os.environ.get("DESTDIR") or "/").absolute()
        return cls(root, Path(os.environ.get("HOME") or "/root").absolute() if user else None)

    @property
    def user(self) -> bool:
        return self.home is not None

    @property
    def staged(self) -> bool:
        """Whether DESTDIR stands for `/`: owners are not set, and nobody need be root."""
        return self.root != Path("/")

    def real(self, path: Path) -> Path:
        """Where `path` is on this disk."""
        return self.root / path.relative_to("/")

    @property
    def lock(self) -> Path:
        """Held while something is changed."""
        return Path((os.environ.get("XDG_RUNTIME_DIR") if self.user else None) or "/run") / "vecmill-deploy.lock"

    def _at(self, system: str, user: str) -> Path:
        return self.home / user if self.home is not None else Path(system)

    @property
    def units(self) -> Path:
        return self._at("/etc/systemd/system", ".config/systemd/user")

    @property
    def code(self) -> Path:
        return self._at("/opt/vecmill", ".local/share/vecmill")

    @property
    def venv(self) -> Path:
        """A link to the release in use."""
        return self.code / "venv"

    @property
    def releases(self) -> Path:
        return self.code / "releases"

    @property
    def config(self) -> Path:
        return self._at("/etc/vecmill", ".config/vecmill")

    @property
    def embed_env(self) -> Path:
        return self.config / "embed.env"

    @property
    def vllm_env(self) -> Path:
        return self.config / "vllm.env"

    @property
    def api_keys(self) -> Path:
        return self.config / "api-keys"

    @property
    def state(self) -> Path:
        return self._at("/var/lib/vecmill", ".local/state/vecmill")

    @property
    def cache(self) -> Path:
        return self._at("/var/cache/vecmill", ".cache/vecmill")

    @property
    def hub_cache(self) -> Path:
        """HF_HOME: what people downloaded by hand is found in theirs."""
        return self._at("/var/cache/vecmill/huggingface", ".cache/huggingface")

    @property
    def vllm_cache(self) -> Path:
        """The hub cache that the container sees; its files are root's, so the system's is not shared."""
        return self._at("/var/cache/qmd-vllm/huggingface", ".cache/huggingface")

    @property
    def readers(self) -> str | None:
        """Owner of files that the service reads and others must not."""
        return None if self.user else f"root:{ACCOUNT}"

    @property
    def root_only(self) -> str | None:
        return None if self.user else "root:root"

    def invocation(self, *options: str) -> str:
        """How to call deploy.py again, for a sentence."""
        return " ".join(
            [*([] if self.user else ["sudo"]), "python3 deploy.py", *(["--user"] if self.user else []), *options]
        )
