"""`--uninstall`: what was deployed goes, what was gathered stays."""

from __future__ import annotations

import os
from pathlib import Path

from deployment import console, files, tailnet
from deployment.actions import Action, Remove, Run
from deployment.commands import ask
from deployment.layout import ACCOUNT, Layout
from deployment.machine import Systemd, Unit
from deployment.neighbours import Tailscale
from deployment.options import EMBED, SERVICES, VLLM, Options
from deployment.steps import Step, carry_out, show


def run(options: Options, layout: Layout) -> int:
    """Each step is tried, whatever became of those before; 1 where one failed."""
    steps = _plan(options, layout)
    if options.dry_run:
        show(steps)
    elif not layout.user and not layout.staged and os.geteuid() != 0:
        console.complain(f"It needs root: {layout.invocation('--uninstall')}")
        return 1
    elif (code := carry_out(steps, keep_going=True)) != 0:
        return code
    _tell_kept(options, layout)
    return 0


def _plan(options: Options, layout: Layout) -> list[Step]:
    systemd = Systemd(layout)
    tailscale = Tailscale.look() if options.tailscale else None
    again = layout.invocation()
    steps = []
    for service in reversed(options.services):
        if tailscale is not None:
            off = (tailnet.off(service),) if f"svc:{service}" in tailscale.served else ()
            steps.append(Step(f"Take svc:{service} from Tailscale", off, again, done="it is not there"))
        unit = systemd.unit(f"{service}.service")
        absent = "deploy.py did not write it" if unit.foreign else "it is not there"
        steps.append(Step(f"Remove {unit.name}", _unit(unit, systemd), again, done=absent))
    gone = [path for path in map(layout.real, _paths(options, layout)) if files.exists(path)]
    steps.append(Step("Remove files", tuple(map(Remove, gone)), again, done="there are none"))
    if options.purge and not layout.user and _everything(options):
        known = ask("getent", "passwd", ACCOUNT).returncode == 0
        account = (Run(("userdel", ACCOUNT)),) if known else ()
        steps.append(Step(f"Remove the account {ACCOUNT}", account, again, done="it is not there"))
    return steps


def _unit(unit: Unit, systemd: Systemd) -> tuple[Action, ...]:
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
    """Code and configuration of the services; with --purge what they gathered too."""
    paths = []
    if EMBED in options.services:
        paths += [layout.venv, layout.releases, layout.embed_env, layout.api_keys]
    if VLLM in options.services:
        paths.append(layout.vllm_env)
    if _everything(options):
        paths += [layout.config, *([] if layout.user else [layout.code])]
    return paths + _gathered(options, layout) if options.purge else paths


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
    kept += sorted(layout.real(layout.units).glob("qmd-*.service.before-vecmill"))
    for path in kept:
        console.say(f"Kept: {path}")
    if kept and not options.purge:
        console.say(f"{layout.invocation('--uninstall', '--purge')} removes what it gathered too.")
    if VLLM in options.services:
        console.say("Kept: container images (docker image ls)")
    if layout.user:
        console.say("Kept: lingering (loginctl disable-linger)")
