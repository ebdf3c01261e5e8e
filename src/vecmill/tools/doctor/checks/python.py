"""The interpreter."""

from __future__ import annotations

import platform
import sys

from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, fail, ok, warn

OLDEST, NEWEST = (3, 11), (3, 14)  # that torch has wheels for
MACHINES = ("x86_64", "aarch64", "arm64", "amd64")


def check(context: Context) -> Finding:
    """The Python that runs this."""
    return judge(sys.version_info[:3], platform.machine(), in_environment=sys.prefix != sys.base_prefix)


def judge(version: tuple[int, ...], machine: str, *, in_environment: bool) -> Finding:
    """By version, architecture and whether it is a virtual environment's."""
    shown = ".".join(map(str, version))
    where = f"in the virtual environment {sys.prefix}" if in_environment else f"the machine's own, {sys.executable}"
    seen = f"Python {shown} on {machine}, {where}"
    facts = {"version": shown, "machine": machine, "virtual_environment": in_environment}
    if version < OLDEST:
        return fail(seen, "vecmill needs Python 3.11 or newer: python3.12 -m venv .venv", **facts)
    if machine.lower() not in MACHINES:
        return fail(f"{seen}; torch has no wheels for it", "A 64-bit Arm or x86 system is needed.", **facts)
    if version[:2] > NEWEST:
        return warn(
            f"{seen}; newer than what vecmill is tried with",
            "If a package cannot be installed: python3.12 -m venv .venv",
            **facts,
        )
    return ok(seen, **facts)
