"""What can be done with deployed services: `--status`, `--logs`, `--restart`, `--stop`, `--uninstall`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from deployment import console, files
from deployment.console import ask
from deployment.layout import ACCOUNT, EMBED, PORT, SERVICES, UNSET_PORT, VLLM, VLLM_PORT, Layout, Options
from deployment.machine import Docker, Systemd, Tailscale, Unit
from deployment.services import Embed, Vllm, port_of, reached_at
from deployment.start import Wait, fetch, take_from_tailnet
from deployment.steps import Action, Remove, RemoveEmpty, Run, Step, carry_out, show


def logs(options: Options, layout: Layout) -> int:
    """Follow the log until interrupted."""
    systemd = Systemd(layout)
    named = [word for service in options.services for word in ("--unit", f"{service}.service")]
    try:
        return subprocess.run(
            systemd.journal(*named, "--follow", "--lines", str(options.lines)), check=False
        ).returncode
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        console.complain(f"journalctl: {error.strerror}")
        return 1


def restart(options: Options, layout: Layout) -> int:
    """Restart what is deployed, the embedder first, and wait for each."""
    systemd = Systemd(layout)
    steps = [_restart(unit, systemd, layout, options) for unit in _deployed(options, systemd)]
    return _do(steps, options, layout)


def stop(options: Options, layout: Layout) -> int:
    """Stop what is deployed, the embedder last; it starts again with the machine."""
    systemd = Systemd(layout)
    steps = [
        Step(f"Stop {unit.name}", (Run(systemd.command("stop", unit.name)),), layout.invocation("--restart"))
        for unit in reversed(_deployed(options, systemd))
    ]
    return _do(steps, options, layout)


def _deployed(options: Options, systemd: Systemd) -> list[Unit]:
    units = [systemd.unit(f"{service}.service") for service in options.services]
    return [unit for unit in units if unit.exists]


def _restart(unit: Unit, systemd: Systemd, layout: Layout, options: Options) -> Step:
    actions: tuple[Action, ...] = (Run(systemd.command("restart", "--no-block", unit.name)),)
    if unit.active == "failed":
        actions = (Run(systemd.command("reset-failed", unit.name)), *actions)
    if options.wait > 0:
        actions += (_wait(unit, systemd, layout, options),)
    return Step(f"Restart {unit.name}", actions, layout.invocation("--stop"))


def _wait(unit: Unit, systemd: Systemd, layout: Layout, options: Options) -> Wait:
    previous = unit.properties.get("InvocationID")
    if unit.name.startswith(EMBED):
        url = Embed(layout, systemd, options, None, None).url
        return Wait(systemd, unit.name, url, "/ready", options.wait, previous, progress=True)
    url = Vllm(layout, systemd, Docker(None, "", False, None), options).url
    return Wait(systemd, unit.name, url, "/health", options.wait, previous)


def _do(steps: list[Step], options: Options, layout: Layout) -> int:
    if not steps:
        console.complain(f"Nothing is deployed: {layout.invocation()}")
        return 1
    if options.dry_run:
        show(steps)
        return 0
    if not layout.user and not layout.staged and os.geteuid() != 0:
        console.complain("It needs root: sudo")
        return 1
    return carry_out(steps)


Row = tuple[str, str, str, str, str]
HEADINGS: Row = ("service", "state", "since", "restarts", "what")


def status(options: Options, layout: Layout) -> int:
    """Print a table. Returns 0 only if each service runs and is ready; vLLM counts if it is deployed or was named."""
    systemd = Systemd(layout)
    rows, code = [HEADINGS], 0
    for service in options.services:
        unit = systemd.unit(f"{service}.service")
        if not unit.exists:
            if service == EMBED or options.named:
                rows.append((service, "not deployed", "", "", layout.invocation()))
                code = 1
            continue
        ready, what = (_embed_state if service == EMBED else _vllm_state)(layout)
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


def _embed_state(layout: Layout) -> tuple[bool, str]:
    text = files.text(layout.real(layout.embed_env))
    settings = files.settings(text or "")
    port = port_of(settings.get("PORT"), PORT if text is None else UNSET_PORT)
    url = f"http://{reached_at(settings.get('HOST') or '127.0.0.1')}:{port}"
    status, health = fetch(f"{url}/health")
    if status == 0:
        return False, f"{url} does not answer"
    return status == 200, f"{url} {_of_health(health)}"


def _of_health(health: dict[str, Any]) -> str:
    if health.get("status") == "ok":
        models = [*(health.get("embedding_models") or [health.get("model")]), *(health.get("rerank_models") or [])]
        return f"{', '.join(map(str, models))} on {health.get('device')}"
    return f"{health.get('status')}, {health.get('percent')} %: {health.get('message')}"


def _vllm_state(layout: Layout) -> tuple[bool, str]:
    settings = files.settings(files.text(layout.real(layout.vllm_env)) or "")
    url = f"http://127.0.0.1:{port_of(settings.get('HOST_PORT'), VLLM_PORT)}"
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


def uninstall(options: Options, layout: Layout) -> int:
    """Try every step, even after one has failed; returns 1 if any has."""
    steps = _removal(options, layout)
    if options.dry_run:
        show(steps)
    elif not layout.user and not layout.staged and os.geteuid() != 0:
        console.complain(f"It needs root: {layout.invocation('--uninstall')}")
        return 1
    elif (code := carry_out(steps, keep_going=True)) != 0:
        return code
    _tell_kept(options, layout)
    return 0


def _removal(options: Options, layout: Layout) -> list[Step]:
    systemd = Systemd(layout)
    tailscale = Tailscale.look() if options.tailscale else None
    again = layout.invocation()
    steps = []
    for service in reversed(options.services):
        if tailscale is not None:
            off = (take_from_tailnet(service),) if f"svc:{service}" in tailscale.served else ()
            steps.append(Step(f"Take svc:{service} from Tailscale", off, again, done="it is not there"))
        unit = systemd.unit(f"{service}.service")
        absent = "deploy.py did not write it" if unit.foreign else "it is not there"
        steps.append(Step(f"Remove {unit.name}", _remove_unit(unit, systemd), again, done=absent))
    gone: list[Action] = [Remove(path) for path in map(layout.real, _paths(options, layout)) if files.exists(path)]
    gone += [RemoveEmpty(path) for path in _around(options, layout) if files.exists(path)]
    steps.append(Step("Remove files", tuple(gone), again, done="there are none"))
    if options.purge and not layout.user and _everything(options):
        steps.append(_remove_account(layout, again))
    return steps


def _remove_account(layout: Layout, again: str) -> Step:
    """The one that deploying makes; a person's of the same name has another home."""
    answered = ask("getent", "passwd", ACCOUNT)
    ours = str(layout.state) in answered.stdout.strip().split(":")
    absent = "it is not there" if answered.returncode != 0 else "deploy.py did not make it"
    actions = (Run(("userdel", ACCOUNT)),) if ours else ()
    return Step(f"Remove the account {ACCOUNT}", actions, again, done=absent)


def _remove_unit(unit: Unit, systemd: Systemd) -> tuple[Action, ...]:
    if not unit.exists or unit.foreign:
        return ()
    actions: list[Action] = [Run(systemd.command("stop", unit.name))]
    if files.exists(unit.path):
        actions += [Run(systemd.command("disable", unit.name)), Remove(unit.path)]
    actions.append(Run(systemd.command("daemon-reload")))
    if unit.active == "failed":
        actions.append(Run(systemd.command("reset-failed", unit.name)))
    return tuple(actions)


def _everything(options: Options) -> bool:
    return set(options.services) == set(SERVICES.values())


def _paths(options: Options, layout: Layout) -> list[Path]:
    """Code and configuration of the services; with --purge their state and models too."""
    paths = []
    if EMBED in options.services:
        paths += [layout.venv, layout.releases, layout.embed_env, layout.api_keys]
    if VLLM in options.services:
        paths.append(layout.vllm_env)
    return paths + _gathered(options, layout) if options.purge else paths


def _around(options: Options, layout: Layout) -> list[Path]:
    """The folders that these are in: others may have put something there, such as a certificate or a clone."""
    return [layout.real(path) for path in (layout.config, layout.code)] if _everything(options) else []


def _gathered(options: Options, layout: Layout) -> list[Path]:
    """State and models. A user's hub cache is everybody's: it is never removed."""
    paths = []
    if EMBED in options.services:
        paths += [layout.state, layout.cache]
    if VLLM in options.services and not layout.user:
        paths.append(layout.vllm_cache.parent)
    return paths


def _tell_kept(options: Options, layout: Layout) -> None:
    kept = [path for path in _gathered(options, layout) if not options.purge and files.exists(layout.real(path))]
    if layout.user and files.exists(layout.real(layout.hub_cache)):
        kept.append(layout.hub_cache)
    if not options.dry_run:
        kept += [path for path in _around(options, layout) if files.exists(path)]
    kept += sorted(layout.real(layout.units).glob("qmd-*.service.before-vecmill"))
    for path in kept:
        console.say(f"Kept: {path}")
    if kept and not options.purge:
        console.say(f"{layout.invocation('--uninstall', '--purge')} removes what it gathered too.")
    if VLLM in options.services:
        console.say("Kept: container images (docker image ls)")
    if layout.user:
        console.say("Kept: lingering (loginctl disable-linger)")
