"""`--logs`, `--restart`, `--stop`."""

from __future__ import annotations

import os
import subprocess

from deployment import console, embed, vllm
from deployment.actions import Action, Run
from deployment.layout import Layout
from deployment.machine import Systemd, Unit
from deployment.neighbours import Docker
from deployment.options import EMBED, Options
from deployment.steps import Step, carry_out, show
from deployment.waiting import Wait


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
        url = embed.Embed(layout, systemd, options, None, None).url
        return Wait(systemd, unit.name, url, "/ready", options.wait, previous, progress=True)
    url = vllm.Vllm(layout, systemd, Docker(None, "", False, None), options).url
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
