"""Starts a unit: puts its files in place, reloads systemd, waits until the process is ready; or takes it all back.

And gives the service its name in the tailnet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from http.client import HTTPException
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

from deployment import console
from deployment.console import Failed, ask
from deployment.layout import Layout, Options
from deployment.machine import Systemd, Tailscale, Unit
from deployment.steps import Action, Link, Run, Step, Undo, WriteFile, same

LOOK_FIRST_S, LOOK_LAST_S = 0.05, 1.0  # between looks, longer from one to the next
PATIENCE_S = 5.0
JOURNAL_LINES = "15"

DIRECT = build_opener(ProxyHandler({}))  # this machine is not reached through a proxy


def fetch(url: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of a GET; status 0 if nothing answers, an empty object if the body is none."""
    try:
        with DIRECT.open(url, timeout=PATIENCE_S) as answer:
            status, body = answer.status, answer.read()
    except HTTPError as error:
        status, body = error.code, error.read()
    except (URLError, OSError, ValueError, HTTPException):  # what answers may speak something else
        return 0, {}
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    return status, value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Wait:
    """Wait until `ready` answers 200, from the process that was started and not the one before."""

    systemd: Systemd
    unit: str
    url: str
    ready: str
    within: float
    previous: str | None = None
    """Invocation of the process that is being replaced."""
    progress: bool = False
    """Whether `/health` tells percent and message while it starts."""

    def describe(self) -> list[str]:
        return [f"wait for {self.url}{self.ready}, at most {console.duration(self.within)}"]

    def apply(self) -> Undo | None:
        shown, started, pause = console.ProgressLine(), monotonic(), LOOK_FIRST_S
        try:
            while not self._is_ready(shown):
                if monotonic() - started > self.within:
                    raise Failed(f"not ready within {console.duration(self.within)}", self._journal())
                sleep(pause)
                pause = min(pause * 1.5, LOOK_LAST_S)
        finally:
            shown.clear()
        return None

    def _is_ready(self, shown: console.ProgressLine) -> bool:
        unit = self.systemd.unit(self.unit)
        self._look_for_failure(unit)
        if unit.active == "deactivating" or (self.previous and unit.properties.get("InvocationID") == self.previous):
            shown.show(None, "the one before is finishing its requests")
            return False
        if fetch(self.url + self.ready)[0] == 200:
            return True
        self._show(shown, unit)
        return False

    def _look_for_failure(self, unit: Unit) -> None:
        if unit.ended:
            result = unit.properties.get("Result", "unknown")
            raise Failed(f"{self.unit} is {unit.active} (result: {result})", self._journal())

    def _show(self, shown: console.ProgressLine, unit: Unit) -> None:
        status, health = fetch(f"{self.url}/health") if self.progress else (0, {})
        percent = health.get("percent")
        if status and isinstance(percent, int | float):
            shown.show(percent, str(health.get("message", "")))
        elif status == 200:
            pass  # it has just become ready
        elif unit.properties.get("SubState") == "start-pre":
            shown.show(None, "what runs before it: enough free memory, the image")
        else:
            shown.show(None, "starting")

    def _journal(self) -> str:
        """The last lines of the unit's log."""
        return ask(
            *self.systemd.journal("--unit", self.unit, "--lines", JOURNAL_LINES, "--output", "cat", "--no-pager")
        ).stdout.strip()


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


REFUSAL = "must be tagged nodes"  # with exit code 0
WAITS = (
    "approval from an admin is required",
    "An admin has to approve this machine for the service once: https://login.tailscale.com/admin/services",
)


def serve_in_tailnet(
    service: str, port: int, host: str, tailscale: Tailscale, layout: Layout, options: Options
) -> Step:
    """Serve a local port as https://<service>.<tailnet>."""
    target = f"{host}:{port}"
    name = tailscale.name(service) or f"{service}.<tailnet>.ts.net"
    title = f"Serve https://{name}"
    undo = " ".join(take_from_tailnet(service).argv)
    if not options.tailscale:
        return Step(title, (), undo, done="left out (--no-tailscale)")
    if tailscale.target(service) in (f"http://{target}", target):
        return Step(title, (), undo, done="already so")
    argv = ("tailscale", "serve", f"--service=svc:{service}", "--https=443", target)
    return Step(title, (Run(argv, refusal=REFUSAL, remarks=(WAITS,)),), undo if layout.user else f"sudo {undo}")


def take_from_tailnet(service: str) -> Run:
    """Stop serving it in the tailnet."""
    return Run(("tailscale", "serve", "clear", f"svc:{service}"))
