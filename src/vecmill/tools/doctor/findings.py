"""What a check found, and the commands that cures are made of."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.machinery import PathFinder


class FindingStatus(StrEnum):
    """From good to bad."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict. `seen` and `cure` may have several lines; the cure has a command where there is one."""

    status: FindingStatus
    seen: str
    cure: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    """For programs: part of the JSON."""
    listed: bool = False
    """Whether people are shown the details too."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A check's finding, and how long it took."""

    name: str
    finding: Finding
    seconds: float

    @property
    def failed(self) -> bool:
        return self.finding.status is FindingStatus.FAIL


def ok(seen: str, **details: object) -> Finding:
    return Finding(FindingStatus.OK, seen, None, details)


def warn(seen: str, cure: str | None = None, **details: object) -> Finding:
    return Finding(FindingStatus.WARN, seen, cure, details)


def fail(seen: str, cure: str | None = None, **details: object) -> Finding:
    return Finding(FindingStatus.FAIL, seen, cure, details)


def together(findings: Iterable[Finding]) -> Finding:
    """One finding of several: the worst status, everything that was seen, every cure once."""
    parts = list(findings)
    details: dict[str, object] = {}
    for part in parts:
        details |= part.details
    cures = dict.fromkeys(part.cure for part in parts if part.cure)
    worst = max((part.status for part in parts), key=list(FindingStatus).index, default=FindingStatus.OK)
    return Finding(worst, "\n".join(part.seen for part in parts if part.seen), "\n".join(cures) or None, details)


def summary(results: Iterable[CheckResult]) -> str:
    """`13 ok, 1 warning, 0 failed`"""
    statuses = [result.finding.status for result in results]
    warnings = statuses.count(FindingStatus.WARN)
    return (
        f"{statuses.count(FindingStatus.OK)} ok, {warnings} warning{'' if warnings == 1 else 's'}, "
        f"{statuses.count(FindingStatus.FAIL)} failed"
    )


def install(*arguments: str) -> str:
    """The command with this Python's installer: pip, or uv in an environment that has no pip."""
    # Not find_spec: setuptools watches for a search for pip, and then takes its replacement of distutils away.
    if PathFinder.find_spec("pip") is None:
        words = ["uv", "pip", "install", "--python", sys.executable]
        arguments = tuple("--reinstall" if argument == "--force-reinstall" else argument for argument in arguments)
    else:
        words = [sys.executable, "-m", "pip", "install"]
    return shlex.join([*words, *arguments])


def split(judge: Callable[..., Finding], sentence: str) -> Finding:
    """A finding from an error's sentence of the form `what is wrong: what helps`."""
    seen, colon, cure = sentence.rpartition(": ")
    return judge(seen, cure[:1].upper() + cure[1:]) if colon else judge(sentence)
