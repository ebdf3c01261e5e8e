"""Running checks, once or until none fails."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from time import monotonic, perf_counter, sleep
from typing import Protocol

from vecmill.config import Settings
from vecmill.tools.doctor.context import Context, NoTorch
from vecmill.tools.doctor.order import CHECKS
from vecmill.tools.doctor.probing import Prober
from vecmill.tools.doctor.report import Finding, Result, fail, warn
from vecmill.tools.doctor.secrets import Secrets

# Seconds between rounds.
AGAIN_EVERY = 1.0


class Show(Protocol):
    """Whoever tells what is found, while it is found."""

    def running(self, name: str) -> None:
        """A check begins."""

    def ended(self, result: Result) -> None:
        """It has ended, for the first time or with another finding than before."""

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        """These have failed, and are looked at again for so many seconds more."""


def run_checks(settings: Settings, names: Collection[str], wait: float, show: Show, results: dict[str, Result]) -> None:
    """Run the checks; those that fail again, until none does or `wait` seconds are over. `results` fills meanwhile."""
    secrets, deadline = Secrets(settings), monotonic() + wait
    with Prober() as prober:
        pending = [name for name in CHECKS if name in names]
        while True:
            context = Context(settings, prober, names)
            for name in pending:
                show.running(name)
                _keep(_run(name, context, secrets), show, results)
            pending = [name for name in pending if results[name].failed]
            left = deadline - monotonic()
            if not pending or left <= 0:
                return
            show.waiting(pending, left)
            sleep(min(AGAIN_EVERY, left))


def _keep(result: Result, show: Show, results: dict[str, Result]) -> None:
    before = results.get(result.name)
    results[result.name] = result
    if before is None or before.finding.status is not result.finding.status:
        show.ended(result)


def _run(name: str, context: Context, secrets: Secrets) -> Result:
    started = perf_counter()
    finding = _finding(name, context)
    seconds = perf_counter() - started
    shown = replace(
        finding,
        seen=secrets.hidden(finding.seen),
        cure=finding.cure and secrets.hidden(finding.cure),
        details={
            key: secrets.hidden(value) if isinstance(value, str) else value for key, value in finding.details.items()
        },
    )
    return Result(name, shown, seconds)


def _finding(name: str, context: Context) -> Finding:
    try:
        return CHECKS[name](context)
    except NoTorch:
        return warn("not measured: torch cannot be imported", "See the check torch.")
    except Exception as error:  # a check that cannot cope is a finding too
        said = (str(error).strip().splitlines() or [""])[0]
        return fail(f"the check itself failed: {type(error).__name__}: {said}")
