"""Whether Python and torch are right for what is here.

Source of the rules on torch: machine code for compute capability 12.0 runs on 12.1
(https://github.com/pytorch/pytorch/pull/166185), PyPI's wheels for Arm have CUDA from torch 2.11 on, and CUDA 12
reaches an eighth of a GB10's speed.
"""

from __future__ import annotations

import platform
import re
import sys

from vecmill.engine.probes.results import GpuSeen, TorchBuild
from vecmill.hardware.gpu import gpu_index
from vecmill.tools.doctor.context import DoctorContext
from vecmill.tools.doctor.findings import Finding, fail, install, ok, warn
from vecmill.tools.doctor.probing import ProbeFailed

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # that torch has wheels for
MACHINES = ("x86_64", "aarch64", "arm64", "amd64")


def check_python(context: DoctorContext) -> Finding:
    """Look at the Python that runs this."""
    return judge_python(sys.version_info[:3], platform.machine(), in_environment=sys.prefix != sys.base_prefix)


def judge_python(version: tuple[int, ...], machine: str, *, in_environment: bool) -> Finding:
    """Judge a Python by version and architecture."""
    shown = ".".join(map(str, version))
    where = f"in the virtual environment {sys.prefix}" if in_environment else f"the machine's own, {sys.executable}"
    seen = f"Python {shown} on {machine}, {where}"
    facts = {"version": shown, "machine": machine, "virtual_environment": in_environment}
    if version < OLDEST_PYTHON:
        return fail(seen, "vecmill needs Python 3.11 or newer: python3.12 -m venv .venv", **facts)
    if machine.lower() not in MACHINES:
        return fail(f"{seen}; torch has no wheels for it", "A 64-bit Arm or x86 system is needed.", **facts)
    if version[:2] > NEWEST_PYTHON:
        return warn(
            f"{seen}; newer than what vecmill is tried with",
            "If a package cannot be installed: python3.12 -m venv .venv",
            **facts,
        )
    return ok(seen, **facts)


OLDEST_TORCH = (2, 11)
GB10 = (12, 1)
INSTALL = install("--force-reinstall", "torch>=2.11")
ON_THE_CPU = "or set DEVICE=cpu to serve from the CPU"


def check_torch(context: DoctorContext) -> Finding:
    """Look at the torch that the server would import."""
    build = context.torch_build
    if isinstance(build, ProbeFailed):
        return fail(f"torch cannot be imported: {build}", INSTALL)
    return judge_torch(build, context.settings.engine.device, has_gpu=context.has_gpu)


def judge_torch(build: TorchBuild, device: str, *, has_gpu: bool) -> Finding:
    """`device`: DEVICE; `has_gpu`: the NVIDIA driver has one."""
    facts: dict[str, object] = {"version": build.version, "cuda": build.cuda, "arch_list": build.arch_list}
    made_for = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else "a CPU-only build"
    seen = f"torch {build.version}, {made_for}"
    if _numbers(build.version) < OLDEST_TORCH:
        return fail(f"{seen}; 2.11 or newer is needed", INSTALL, **facts)
    if (missing := _missing(build, device, has_gpu=has_gpu)) is not None:
        return fail(f"{seen}; {missing}", "Set DEVICE=auto.", **facts)
    if not has_gpu and not build.gpus:
        return ok(f"{seen}; no NVIDIA GPU here, so it runs on the {'Apple GPU' if build.mps else 'CPU'}", **facts)
    if device in ("cpu", "mps"):
        return ok(f"{seen}; DEVICE={device} leaves the GPU unused", **facts)
    if build.cuda is None and build.hip is None:
        return fail(f"{seen}, beside an NVIDIA GPU", f"{INSTALL}\n{ON_THE_CPU}", **facts)
    if not build.gpus:
        return fail(
            f"{seen}, cannot use the GPU: {build.cuda_error}",
            f"nvidia-smi (see the check driver), {ON_THE_CPU}",
            **facts,
        )
    return _judge_cards(build, seen, facts)


def _missing(build: TorchBuild, device: str, *, has_gpu: bool) -> str | None:
    """What is missing where the settings name a device that is not there; else None."""
    if device == "mps" and not build.mps:
        return "DEVICE=mps, and it sees no Apple GPU"
    if device.startswith("cuda") and not has_gpu and not build.gpus:
        return f"DEVICE={device}, and there is no NVIDIA GPU"
    index = gpu_index(device)
    if build.gpus and index >= len(build.gpus):
        return f"DEVICE={device}, and it sees {len(build.gpus)} GPU{'' if len(build.gpus) == 1 else 's'}"
    return None


def _judge_cards(build: TorchBuild, seen: str, facts: dict[str, object]) -> Finding:
    for card in build.gpus:
        if card.capability == GB10 and build.cuda is not None and _numbers(build.cuda) < (13,):
            return fail(
                f"{seen}: on a {card.name} matrix products reach 12 TFLOPS with CUDA 12, and 70 to 95 with CUDA 13",
                INSTALL,
                **facts,
            )
        if build.arch_list and not covered(card.capability, build.arch_list):
            shown = ".".join(map(str, card.capability))
            return fail(
                f"{seen}, has no code for {card.name} (compute capability {shown}), only {' '.join(build.arch_list)}",
                f"Install a build of torch for this card (https://pytorch.org/get-started), {ON_THE_CPU}",
                **facts,
            )
    return ok(f"{seen}: {', '.join(_described(card, build.arch_list) for card in build.gpus)}", **facts)


def covered(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    """Whether code for one of the architectures runs on a card.

    Machine code (`sm_120`) runs on the same major version from its minor one on, code that the driver compiles
    (`compute_120`) on every newer card; `sm_120a` on its own alone.
    """
    for arch in arch_list:
        if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)) is None:
            continue
        made_for = (int(match[2]), int(match[3]))
        alone = bool(match[4]) and capability == made_for
        newer = made_for <= capability and (match[1] == "compute" or made_for[0] == capability[0])
        if alone or (not match[4] and newer):
            return True
    return False


def _described(card: GpuSeen, arch_list: tuple[str, ...]) -> str:
    major, minor = card.capability
    exact = f"sm_{major}{minor}" in arch_list
    by = "" if exact or not arch_list else f", by the code for {_nearest(card.capability, arch_list)}"
    return f"{card.name} (compute capability {major}.{minor}{by})"


def _nearest(capability: tuple[int, int], arch_list: tuple[str, ...]) -> str:
    return next(arch for arch in reversed(arch_list) if covered(capability, (arch,)))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])
