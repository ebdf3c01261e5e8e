"""Running checks, once or until none fails. Nothing that is shown holds a secret of the settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from time import monotonic, perf_counter, sleep
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from vecmill.config import Settings
from vecmill.tools.doctor.checks.computing import check_allocation, check_attention, check_compile
from vecmill.tools.doctor.checks.gpu import check_clock, check_driver, check_gpu, check_matmul
from vecmill.tools.doctor.checks.installation import check_python, check_torch
from vecmill.tools.doctor.checks.memory import check_memory
from vecmill.tools.doctor.checks.models import check_disk, check_models
from vecmill.tools.doctor.checks.programs import check_docker, check_proxies, check_ray, check_tailscale
from vecmill.tools.doctor.checks.server import check_port, check_redis, check_state
from vecmill.tools.doctor.context import DoctorContext, NoTorch
from vecmill.tools.doctor.findings import CheckResult, Finding, fail, warn
from vecmill.tools.doctor.probing import Prober

Check = Callable[[DoctorContext], Finding]

# In the order in which they run: a later one's finding is often explained by an earlier one's.
CHECKS: Mapping[str, Check] = {
    "python": check_python,
    "torch": check_torch,
    "driver": check_driver,
    "gpu": check_gpu,
    "matmul": check_matmul,
    "clock": check_clock,
    "memory": check_memory,
    "allocation": check_allocation,
    "attention": check_attention,
    "compile": check_compile,
    "models": check_models,
    "disk": check_disk,
    "port": check_port,
    "state": check_state,
    "redis": check_redis,
    "tailscale": check_tailscale,
    "docker": check_docker,
    "proxies": check_proxies,
    "ray": check_ray,
}


AGAIN_EVERY = 1.0  # seconds between rounds
HIDDEN = "***"
SHORTEST = 4  # characters: what is shorter stands in many words


class Reporter:
    """Is told of the findings while they are made; this one shows nothing."""

    def running(self, name: str) -> None:
        """A check begins."""

    def ended(self, result: CheckResult) -> None:
        """It has ended, for the first time or with another status than before."""

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        """These have failed, and are looked at again for so many seconds more."""


def run_checks(
    settings: Settings, names: Collection[str], wait: float, reporter: Reporter, results: dict[str, CheckResult]
) -> None:
    """Run the checks; those that fail again, until none does or `wait` seconds are over. `results` fills meanwhile."""
    secrets, deadline = Secrets(settings), monotonic() + wait
    with Prober() as prober:
        pending = [name for name in CHECKS if name in names]
        while True:
            context = DoctorContext(settings, prober, names)
            for name in pending:
                reporter.running(name)
                _keep(_run(name, context, secrets), reporter, results)
            pending = [name for name in pending if results[name].failed]
            left = deadline - monotonic()
            if not pending or left <= 0:
                return
            reporter.waiting(pending, left)
            sleep(min(AGAIN_EVERY, left))


def _keep(result: CheckResult, reporter: Reporter, results: dict[str, CheckResult]) -> None:
    before = results.get(result.name)
    results[result.name] = result
    if before is None or before.finding.status is not result.finding.status:
        reporter.ended(result)


def _run(name: str, context: DoctorContext, secrets: Secrets) -> CheckResult:
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
    return CheckResult(name, shown, seconds)


def _finding(name: str, context: DoctorContext) -> Finding:
    try:
        return CHECKS[name](context)
    except NoTorch:
        return warn("not measured: torch cannot be imported", "See the check torch.")
    except Exception as error:  # a check that cannot cope is a finding too
        reason = (str(error).strip().splitlines() or [""])[0]
        return fail(f"the check itself failed: {type(error).__name__}: {reason}")


class Secrets:
    """The secrets of the settings, and the passwords in their addresses."""

    def __init__(self, settings: Settings) -> None:
        values = set(_values(settings))
        values |= {password for value in values if (password := _password(value))}
        self._values = sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)

    def hidden(self, text: str) -> str:
        """The text with each secret replaced."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text


def _values(settings: Settings) -> Iterator[str]:
    for field in fields(settings):
        group: BaseModel = getattr(settings, field.name)
        for _, value in group:
            yield from _secrets(value)


def _secrets(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, tuple):
        for part in value:
            yield from _secrets(part)


def _password(value: str) -> str | None:
    try:
        password = urlsplit(value).password
    except ValueError:
        return None
    return password and unquote(password)
