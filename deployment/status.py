"""`--status`: a short table, and an exit code for scripts."""

from __future__ import annotations

from typing import Any

from deployment import console, env_file, files
from deployment.layout import Layout
from deployment.machine import Systemd, Unit
from deployment.neighbours import Tailscale
from deployment.options import EMBED, PORT, VLLM_PORT, Options
from deployment.waiting import fetch

Row = tuple[str, str, str, str, str]
HEADINGS: Row = ("service", "state", "since", "restarts", "what")


def run(options: Options, layout: Layout) -> int:
    """0 only when each service is running and ready; vLLM counts where it is deployed, or named."""
    systemd = Systemd(layout)
    rows, code = [HEADINGS], 0
    for service in options.services:
        unit = systemd.unit(f"{service}.service")
        if not unit.exists:
            if service == EMBED or options.named:
                rows.append((service, "not deployed", "", "", layout.invocation()))
                code = 1
            continue
        ready, what = (_embed if service == EMBED else _vllm)(layout)
        state = f"{unit.active}, {'ready' if ready else 'not ready'}"
        rows.append((service, state, _since(unit), unit.properties.get("NRestarts", ""), what))
        code = code if ready and unit.active == "active" else 1
    _print(rows)
    if options.tailscale:
        _addresses(options)
    for path in map(layout.real, (layout.embed_env, layout.vllm_env)):
        if files.exists(path) and files.text(path) is None:
            console.say(f"{path} can be read by root only: its port is taken for the usual one.")
    return code


def _since(unit: Unit) -> str:
    return unit.properties.get("ActiveEnterTimestamp", "") if unit.active == "active" else ""


def _embed(layout: Layout) -> tuple[bool, str]:
    settings = env_file.values(files.text(layout.real(layout.embed_env)) or "")
    host = settings.get("HOST") or "127.0.0.1"
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound
        host = "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.get('PORT') or PORT}"
    status, health = fetch(f"{url}/health")
    if status == 0:
        return False, f"{url} does not answer"
    return status == 200, f"{url} {_of_health(health)}"


def _of_health(health: dict[str, Any]) -> str:
    if health.get("status") == "ok":
        models = [*(health.get("embedding_models") or [health.get("model")]), *(health.get("rerank_models") or [])]
        return f"{', '.join(map(str, models))} on {health.get('device')}"
    return f"{health.get('status')}, {health.get('percent')} %: {health.get('message')}"


def _vllm(layout: Layout) -> tuple[bool, str]:
    settings = env_file.values(files.text(layout.real(layout.vllm_env)) or "")
    url = f"http://127.0.0.1:{settings.get('HOST_PORT') or VLLM_PORT}"
    status, _ = fetch(f"{url}/health")
    if status != 200:
        return False, f"{url} does not answer" if status == 0 else f"{url} answers {status}"
    models = fetch(f"{url}/v1/models")[1].get("data") or []
    return True, f"{url} {', '.join(str(model.get('id')) for model in models)}"


def _addresses(options: Options) -> None:
    tailscale = Tailscale.look()
    for service in options.services:
        target, name = tailscale.target(service), tailscale.name(service)
        if target:
            console.say(f"https://{name or service} -> {target}")
    if tailscale.installed and not tailscale.running:
        console.say("Tailscale is not logged in: sudo tailscale up")


def _print(rows: list[Row]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        console.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
