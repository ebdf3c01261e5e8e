"""The units' texts, from the templates in `units/`."""

from __future__ import annotations

import re
from pathlib import Path

from deployment.layout import EMBED_UNIT, Layout

TEMPLATES = Path(__file__).parent / "units"
SYSTEM_ORDER = "Wants=network-online.target\nAfter=network-online.target nvidia-persistenced.service"
# Both talk to the engine's socket and need nothing else of the machine.
VLLM_CONFINEMENT = "NoNewPrivileges=yes\nPrivateTmp=yes\nProtectSystem=strict\nProtectHome=read-only\nUMask=0077"


def embed_unit(layout: Layout, shutdown_seconds: float) -> str:
    """qmd-embed.service."""
    kind = "user" if layout.user else "system"
    return _fill(
        "qmd-embed.service.in",
        CONFINEMENT=_fill(f"embed-{kind}.conf.in", SECCOMP=_fill("seccomp.conf.in").rstrip()).rstrip(),
        ORDER="" if layout.user else SYSTEM_ORDER,
        VENV=layout.venv,
        CONFIG=layout.config,
        HUB_CACHE=layout.hub_cache,
        CACHE=layout.cache,
        STATE=layout.state,
        STOP_SECONDS=round(shutdown_seconds) + 15,
        TARGET=_target(layout),
    )


def vllm_unit(layout: Layout, docker: str, hub_cache: str) -> str:
    """qmd-vllm.service."""
    engine = "Requires=docker.service\nWants=network-online.target\nAfter=docker.service network-online.target"
    return _fill(
        "qmd-vllm.service.in",
        ORDER=f"After={EMBED_UNIT}" + ("" if layout.user else f"\n{engine}"),
        CONFIG=layout.config,
        DOCKER=docker,
        HUB_CACHE=hub_cache,
        CONFINEMENT="NoNewPrivileges=yes" if layout.user else VLLM_CONFINEMENT,
        TARGET=_target(layout),
    )


def _target(layout: Layout) -> str:
    return "default.target" if layout.user else "multi-user.target"


def _fill(template: str, **parts: object) -> str:
    text = (TEMPLATES / template).read_text("utf-8")
    for _ in range(2):  # parts have parts
        text = re.sub(r"@([A-Z_]+)@", lambda found: str(parts.get(found[1], found[0])), text)
    return text
