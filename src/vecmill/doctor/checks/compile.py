"""torch.compile: what it needs, and whether it works."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from vecmill.doctor.context import Context
from vecmill.doctor.installing import install
from vecmill.doctor.probing import ProbeFailed
from vecmill.doctor.report import Finding, fail, ok, warn
from vecmill.engine.probes.results import CompileTry

SECONDS = 90.0
COMPILERS = {"cuda": ("CC", ("gcc", "cc", "clang")), "cpu": ("CXX", ("g++", "c++", "clang++"))}
TOLERANCE = 0.001
NOT_NEEDED = "or set TORCH_COMPILE=false: eager layers need none of it"


def check(context: Context) -> Finding:
    """Look for a compiler and Python's headers, then compile something small."""
    wanted = context.settings.engine.torch_compile
    if wanted == "false":
        return ok("TORCH_COMPILE=false: not needed")
    compiler, headers = _compiler(context.device), _headers()
    if compiler is None or not headers.is_file():
        missing = " and ".join(
            what for what, there in (("a C++ compiler", compiler), ("Python.h", headers.is_file())) if not there
        )
        return judge_missing(missing, required=wanted == "true")
    try:
        tried = context.prober.ask("compiling", context.device, CompileTry, SECONDS)
    except ProbeFailed as error:
        finding = fail if wanted == "true" else warn
        return finding(
            f"{compiler} and {headers} are there, and torch.compile fails: {error}",
            f"{install('--upgrade', 'torch')}, {NOT_NEEDED}",
        )
    return judge(tried, compiler)


def judge_missing(missing: str, *, required: bool) -> Finding:
    """`required`: TORCH_COMPILE=true."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    cure = f"sudo apt install build-essential {version}, {NOT_NEEDED}"
    if required:
        return fail(f"{missing} not found, and TORCH_COMPILE=true needs it", cure)
    return warn(f"{missing} not found: the layers run in eager mode", cure)


def judge(tried: CompileTry, compiler: str) -> Finding:
    """What was compiled must compute the same."""
    seen = f"{compiler} and Python's headers are there; a small function compiled in {tried.seconds:.1f} s"
    difference = tried.largest_difference
    if difference is None or difference > TOLERANCE:
        return fail(f"{seen}, and computes something else (by {difference})", "Set TORCH_COMPILE=false")
    return ok(seen, compiler=compiler, seconds=tried.seconds)


def _compiler(device: str) -> str | None:
    """The one that torch, or Triton on a GPU, would take."""
    variable, names = COMPILERS["cuda" if device.startswith("cuda") else "cpu"]
    given = os.environ.get(variable)
    return next((found for name in ([given] if given else names) if (found := shutil.which(name))), None)


def _headers() -> Path:
    return Path(sysconfig.get_paths()["include"], "Python.h")
