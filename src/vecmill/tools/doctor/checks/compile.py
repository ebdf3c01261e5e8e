"""torch.compile: what it needs, and whether it works."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from vecmill.engine.probes.results import CompileTry
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.installing import install
from vecmill.tools.doctor.probing import ProbeFailed
from vecmill.tools.doctor.report import Finding, fail, ok, warn

SECONDS = 90.0
# The variable that names it, the names that are looked for, what it is called and the package that has it. Triton takes
# a C compiler, torch on a CPU one for C++.
COMPILERS = {
    "cuda": ("CC", ("gcc", "clang"), "a C compiler", "gcc"),
    "cpu": ("CXX", ("g++", "c++", "clang++"), "a C++ compiler", "g++"),
}
TOLERANCE = 0.001
NOT_NEEDED = "or set TORCH_COMPILE=false: eager layers need none of it"


def check(context: Context) -> Finding:
    """Look for a compiler and Python's headers, then compile something small."""
    wanted = context.settings.engine.torch_compile
    if wanted == "false":
        return ok("TORCH_COMPILE=false: not needed")
    on_gpu = context.device.startswith("cuda")
    required = on_gpu or wanted == "true"
    compiler, headers = _compiler(on_gpu=on_gpu), _headers()
    if compiler is None or not headers.is_file():
        return judge_missing(compiler=compiler is not None, headers=headers.is_file(), on_gpu=on_gpu, required=required)
    try:
        tried = context.prober.ask("compiling", context.device, CompileTry, SECONDS)
    except ProbeFailed as error:
        finding = fail if required else warn
        return finding(
            f"{compiler} and {headers} are there, and torch.compile fails: {error}",
            f"{install('--upgrade', 'torch')}, {NOT_NEEDED}",
        )
    return judge(tried, compiler)


def judge_missing(*, compiler: bool, headers: bool, on_gpu: bool, required: bool) -> Finding:
    """`compiler`, `headers`: which is there. `required`: by TORCH_COMPILE=true, or on a GPU, where much is lost."""
    _, _, called, package = COMPILERS["cuda" if on_gpu else "cpu"]
    needs = (
        (called, package, compiler),
        ("Python.h", f"python{sys.version_info.major}.{sys.version_info.minor}-dev", headers),
    )
    missing = " and ".join(what for what, _, there in needs if not there)
    cure = f"sudo apt install {' '.join(name for _, name, there in needs if not there)}, {NOT_NEEDED}"
    if not required:
        return warn(f"{missing} not found: the layers run in eager mode", cure)
    why = "the layers run in eager mode on the GPU, up to half as fast" if on_gpu else "TORCH_COMPILE=true needs it"
    return fail(f"{missing} not found, and {why}", cure)


def judge(tried: CompileTry, compiler: str) -> Finding:
    """What was compiled must compute the same."""
    seen = f"{compiler} and Python's headers are there; a small function compiled in {tried.seconds:.1f} s"
    difference = tried.largest_difference
    if difference is None or difference > TOLERANCE:
        return fail(f"{seen}, and computes something else (by {difference})", "Set TORCH_COMPILE=false")
    return ok(seen, compiler=compiler, seconds=tried.seconds)


def _compiler(*, on_gpu: bool) -> str | None:
    """The one that Triton, or torch on a CPU, would take."""
    variable, names, _, _ = COMPILERS["cuda" if on_gpu else "cpu"]
    given = os.environ.get(variable)
    return next((found for name in ([given] if given else names) if (found := shutil.which(name))), None)


def _headers() -> Path:
    return Path(sysconfig.get_paths()["include"], "Python.h")
