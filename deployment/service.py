"""Bringing a unit up: files in place, systemd told, the process running and ready; or all of it back."""

from __future__ import annotations

from dataclasses import replace

from deployment.actions import Action, Link, Run, WriteFile, same
from deployment.machine import Systemd, Unit
from deployment.steps import Step
from deployment.waiting import Wait


def activation(
    unit: Unit,
    systemd: Systemd,
    wanted: tuple[WriteFile | Link, ...],
    wait: Wait,
    *,
    undo: str,
    before: tuple[Action, ...] = (),
    after: tuple[Action, ...] = (),
    reloadable: tuple[WriteFile, ...] = (),
) -> Step:
    """Change what differs on the disk, and restart only if something does or nothing runs.

    A change of nothing but `reloadable` files is a reload. When the service ran before, a failure brings it back.
    """
    changed = [action for action in wanted if not same(action)]
    reread = [action for action in reloadable if not same(action)]
    told = _tell_systemd(unit, systemd, any(action.path == unit.path for action in changed))
    starts = _start(unit, systemd, bool(changed), bool(reread))
    actions: tuple[Action, ...] = (*before, *changed, *reread, *told, *starts)
    if starts and wait.within > 0:
        restarted = "restart" in starts[-1].argv
        actions += (replace(wait, previous=unit.properties.get("InvocationID") if restarted else None),)
    elif not starts and unit.active == "activating" and wait.within > 0:
        actions += (wait,)
    ran = unit.runs
    return Step(
        f"Start {unit.name}",
        (*actions, *after),
        undo,
        done="runs as it should",
        restores=ran,
        recovery=_recovery(unit, systemd) if ran and actions else (),
    )


def _tell_systemd(unit: Unit, systemd: Systemd, rewritten: bool) -> tuple[Run, ...]:
    told = []
    if rewritten or unit.properties.get("NeedDaemonReload") == "yes":
        told.append(Run(systemd.command("daemon-reload")))
    if not unit.enabled:
        told.append(Run(systemd.command("enable", unit.name)))
    return tuple(told)


def _start(unit: Unit, systemd: Systemd, changed: bool, reread: bool) -> tuple[Run, ...]:
    if unit.runs and not changed:
        return (Run(systemd.command("reload", unit.name)),) if reread else ()
    again = (Run(systemd.command("reset-failed", unit.name)),) if unit.active == "failed" else ()
    # Without --no-block it would wait in silence until the models are loaded.
    return (*again, Run(systemd.command("restart", "--no-block", unit.name)))


def _recovery(unit: Unit, systemd: Systemd) -> tuple[Run, ...]:
    return (Run(systemd.command("daemon-reload")), Run(systemd.command("restart", "--no-block", unit.name)))
