"""Waiting until a service is ready, and seeing early that it will not be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

from deployment import console
from deployment.actions import Undo
from deployment.commands import Failed, ask
from deployment.machine import Systemd, Unit

LOOK_FIRST_S, LOOK_LAST_S = 0.05, 1.0  # between looks, longer from one to the next
PATIENCE_S = 5.0
JOURNAL_LINES = "15"

DIRECT = build_opener(ProxyHandler({}))  # this machine is not reached through a proxy


def fetch(url: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of a GET; status 0 where nothing answers, an empty object where it is none."""
    try:
        with DIRECT.open(url, timeout=PATIENCE_S) as answer:
            status, body = answer.status, answer.read()
    except HTTPError as error:
        status, body = error.code, error.read()
    except (URLError, OSError, ValueError):
        return 0, {}
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    return status, found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Wait:
    """Until `ready` answers 200, by the process that was started and not the one before."""

    systemd: Systemd
    unit: str
    url: str
    ready: str
    within: float
    previous: str | None = None
    """Invocation of the process that is being replaced."""
    progress: bool = field(default=False)
    """Whether `/health` tells percent and message while it starts."""

    def describe(self) -> list[str]:
        return [f"wait for {self.url}{self.ready}, at most {console.duration(self.within)}"]

    def apply(self) -> Undo | None:
        shown, started, pause = console.Progress(), monotonic(), LOOK_FIRST_S
        try:
            while not self._is_ready(shown):
                if monotonic() - started > self.within:
                    raise Failed(f"not ready within {console.duration(self.within)}", self._journal())
                sleep(pause)
                pause = min(pause * 1.5, LOOK_LAST_S)
        finally:
            shown.clear()
        return None

    def _is_ready(self, shown: console.Progress) -> bool:
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

    def _show(self, shown: console.Progress, unit: Unit) -> None:
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
