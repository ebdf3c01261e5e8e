"""All that is known before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

from deployment.embed import Embed
from deployment.layout import Layout
from deployment.neighbours import Docker, Tailscale
from deployment.options import Options
from deployment.vllm import Vllm

VENV_BYTES = 8_000_000_000


@dataclass(frozen=True)
class Situation:
    """All that is looked at."""

    options: Options
    layout: Layout
    user: str
    tailscale: Tailscale | None
    docker: Docker | None
    embed: Embed | None
    vllm: Vllm | None
    builds: bool
    """Whether a release has to be built."""
