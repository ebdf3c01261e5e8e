"""What the command line asked for, checked as far as it can be without looking at the machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

EMBED, VLLM = "qmd-embed", "qmd-vllm"
SERVICES = {"embed": EMBED, "vllm": VLLM}

IMAGE = "nvcr.io/nvidia/vllm:26.05-py3"
MODEL = "Qwen/Qwen3-4B"
PORT, VLLM_PORT = 8001, 8000
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
