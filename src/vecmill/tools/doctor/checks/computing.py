"""Whether this device computes as the server needs it: refused allocations, attention, torch.compile."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from vecmill.engine.probes.results import AttentionComparison, CompileTry, Oversized
from vecmill.hardware.memory import GIGABYTE
from vecmill.tools.doctor.context import DoctorContext
from vecmill.tools.doctor.findings import Finding, fail, install, ok, warn
from vecmill.tools.doctor.probing import ProbeFailed

ALLOCATION_SECONDS = 60.0
QUICK = 5.0
LEAST_MB = 4096  # a GB10 that runs out of memory freezes, so nothing is tried near that
ALLOCATION_CURE = (
    "The driver or torch is at fault: update both. Until then MEMORY_FRACTION does not protect this machine."
)


def check_allocation(context: DoctorContext) -> Finding:
    """Ask for a little more than a cap of 1 GiB."""
    if not context.device.startswith("cuda"):
        return ok("not tried on a CPU: there the server refuses by itself what would take too much")
    available = context.gpu_memory.available_mb
    if available is not None and available < LEAST_MB:
        return warn(f"not tried: only {available} MB are available", "See the check memory.")
    try:
        oversized = context.prober.ask("allocation", context.device, Oversized, ALLOCATION_SECONDS)
    except ProbeFailed as error:
        if error.kind == "TimeoutError":
            return fail(f"an allocation above the process's cap hangs: {error}", ALLOCATION_CURE)
        raise
    return judge_allocation(oversized)


def judge_allocation(oversized: Oversized) -> Finding:
    """The allocation must fail at once and leave a device that works."""
    request = f"{oversized.requested / GIGABYTE:.1f} GB above a cap of {oversized.cap / GIGABYTE:.1f}"
    facts = {"cap_bytes": oversized.cap, "asked_bytes": oversized.requested, "refused_with": oversized.refused}
    if oversized.refused is None:
        return fail(f"{request} were allocated: the cap does not hold", ALLOCATION_CURE, **facts)
    if not oversized.works_after:
        return fail(f"{request} were refused, and then the device computed wrongly", ALLOCATION_CURE, **facts)
    seen = f"{request} were refused with {oversized.refused} in {oversized.seconds:.2f} s, and the device works on"
    return ok(seen, **facts) if oversized.seconds < QUICK else warn(seen, ALLOCATION_CURE, **facts)


ATTENTION_SECONDS = 120.0
# Outputs are weighted means of values of about 1: bfloat16 has 3 digits, float32 7.
TOLERANCES = {"bfloat16": 0.05, "float32": 0.0001}
WITHOUT_VARLEN = "Set USE_FLASH_ATTN=false"


def check_attention(context: DoctorContext) -> Finding:
    """Compare attention over packed rows with SDPA row by row."""
    try:
        comparison = context.prober.ask("attention", context.device, AttentionComparison, ATTENTION_SECONDS)
    except ProbeFailed as error:
        if error.kind in ("ImportError", "ModuleNotFoundError"):
            return fail(
                f"the server's attention cannot be imported: {error}",
                "See the check torch: torch.nn.attention.varlen needs 2.11 or newer.",
            )
        raise
    return judge_attention(comparison, used=context.settings.engine.use_flash_attn)


def judge_attention(comparison: AttentionComparison, *, used: bool) -> Finding:
    """`used`: USE_FLASH_ATTN."""
    path = "varlen attention" if comparison.varlen else "packed attention (SDPA; varlen is not used on a CPU)"
    difference = comparison.largest_difference
    seen = (
        f"{path} over {comparison.rows} rows and {comparison.tokens} tokens: differs from SDPA row by row by "
        f"{'a value that is no number' if difference is None else f'{difference:.2g}'} at the most in "
        f"{comparison.dtype}, and is {comparison.speedup:.1f} times as fast"
    )
    facts = {"largest_difference": difference, "speedup": comparison.speedup, "varlen": comparison.varlen}
    if comparison.varlen and not used:
        seen += "; USE_FLASH_ATTN=false leaves it unused"
    if difference is None or difference > TOLERANCES.get(comparison.dtype, 0.05):
        cure = WITHOUT_VARLEN if comparison.varlen else "This torch computes wrongly: install another version."
        return fail(seen, f"{cure}.", **facts)
    if comparison.varlen and used and comparison.speedup < 0.9:
        return warn(seen, f"{WITHOUT_VARLEN}: it is faster here.", **facts)
    return ok(seen, **facts)


COMPILE_SECONDS = 90.0
# The variable that names it, the names that are looked for, what it is called and the package that has it. Triton takes
# a C compiler, torch on a CPU one for C++.
COMPILERS = {
    "cuda": ("CC", ("gcc", "clang"), "a C compiler", "gcc"),
    "cpu": ("CXX", ("g++", "c++", "clang++"), "a C++ compiler", "g++"),
}
COMPILE_TOLERANCE = 0.001
NOT_NEEDED = "or set TORCH_COMPILE=false: eager layers need none of it"


def check_compile(context: DoctorContext) -> Finding:
    """Look for a compiler and Python's headers, then compile something small."""
    wanted = context.settings.engine.torch_compile
    if wanted == "false":
        return ok("TORCH_COMPILE=false: not needed")
    on_gpu = context.device.startswith("cuda")
    if wanted == "auto" and context.device == "cpu":
        return ok("TORCH_COMPILE=auto: not needed on a CPU, where compiled layers are no faster")
    required = on_gpu or wanted == "true"
    compiler, headers = _compiler(on_gpu=on_gpu), _headers()
    if compiler is None or not headers.is_file():
        return judge_no_compiler(
            compiler=compiler is not None, headers=headers.is_file(), on_gpu=on_gpu, required=required
        )
    try:
        tried = context.prober.ask("compiling", context.device, CompileTry, COMPILE_SECONDS)
    except ProbeFailed as error:
        finding = fail if required else warn
        return finding(
            f"{compiler} and {headers} are there, and torch.compile fails: {error}",
            f"{install('--upgrade', 'torch')}, {NOT_NEEDED}",
        )
    return judge_compile(tried, compiler)


def judge_no_compiler(*, compiler: bool, headers: bool, on_gpu: bool, required: bool) -> Finding:
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


def judge_compile(tried: CompileTry, compiler: str) -> Finding:
    """The compiled function must compute the same as the eager one."""
    seen = f"{compiler} and Python's headers are there; a small function compiled in {tried.seconds:.1f} s"
    difference = tried.largest_difference
    if difference is None or difference > COMPILE_TOLERANCE:
        return fail(f"{seen}, and computes something else (by {difference})", "Set TORCH_COMPILE=false")
    return ok(seen, compiler=compiler, seconds=tried.seconds)


def _compiler(*, on_gpu: bool) -> str | None:
    """The compiler that Triton, or torch on a CPU, would use."""
    variable, names, _, _ = COMPILERS["cuda" if on_gpu else "cpu"]
    given = os.environ.get(variable)
    return next((path for name in ([given] if given else names) if (path := shutil.which(name))), None)


def _headers() -> Path:
    return Path(sysconfig.get_paths()["include"], "Python.h")
