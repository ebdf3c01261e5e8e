"""The GPU: its driver, what NVML says of it, its clock under load, and how fast it multiplies matrices.

Source of the driver's rules: https://docs.nvidia.com/deploy/cuda-compatibility: CUDA 13 needs R580, CUDA 12 R525; a
driver for CUDA 13.0 runs what was built with any 13.x.

Sources of the peaks, bfloat16 with float32 accumulation and without sparsity: NVIDIA's datasheets of A100, H100, H200,
L4, L40S and HGX B200, and its architecture whitepapers of Ada (RTX 4090), Blackwell (RTX 5090) and RTX PRO Blackwell.
A GB10 gives 70 to 95 TFLOPS with CUDA 13 (https://github.com/huggingface/kernels/pull/283), of a peak of about 125.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from vecmill.core.threads import within
from vecmill.engine.probes.results import Load, MatmulSpeed
from vecmill.hardware.gpu import FLOAT8, LOADED_PERCENT, GpuReading, clock_verdict, gpu_index, no_float8
from vecmill.hardware.nvml import reading
from vecmill.tools.doctor.context import DoctorContext, NoTorch
from vecmill.tools.doctor.findings import Finding, FindingStatus, fail, ok, split, warn

OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version
NOT_THE_GPU = "or set DEVICE=cpu to serve from the CPU"
UPDATE = f"sudo apt update && sudo apt full-upgrade, then sudo reboot (a DGX Spark), {NOT_THE_GPU}"


def check_driver(context: DoctorContext) -> Finding:
    """Ask NVML, the kernel and the PCI bus."""
    if context.gpu is not None:
        try:
            torch_cuda = context.build.cuda
        except NoTorch:
            torch_cuda = None
        return judge_driver(context.gpu.driver_version, context.gpu.cuda_version, torch_cuda)
    unused = context.settings.engine.device in ("cpu", "mps")
    if not context.has_gpu and not context.cards:
        return ok("no NVIDIA GPU here, and none is needed")
    if unused:
        return ok("there is an NVIDIA GPU, and DEVICE leaves it unused")
    if not context.has_gpu:
        return fail(
            f"an NVIDIA GPU is on the PCI bus ({', '.join(context.cards)}), and the driver is not loaded",
            f"sudo ubuntu-drivers install, then sudo reboot, {NOT_THE_GPU}",
        )
    return warn(f"the kernel's driver has a GPU, and NVML does not answer: {context.no_gpu}", "nvidia-smi")


def judge_driver(version: str | None, cuda: str | None, torch_cuda: str | None) -> Finding:
    """`cuda`: the newest that the driver knows; `torch_cuda`: what torch was built with, None where not with CUDA."""
    seen = f"driver {version}, for CUDA up to {cuda}"
    facts = {"version": version, "cuda": cuda, "torch_cuda": torch_cuda}
    if torch_cuda is None or version is None:
        return ok(seen, **facts)
    oldest = OLDEST_DRIVER.get(_major(torch_cuda))
    if oldest is not None and _major(version) < oldest:
        return fail(f"{seen}; torch's CUDA {torch_cuda} needs R{oldest} or newer", UPDATE, **facts)
    if cuda is not None and _major(cuda) < _major(torch_cuda):
        return fail(f"{seen}; torch was built with CUDA {torch_cuda}", UPDATE, **facts)
    if cuda is not None and cuda != torch_cuda:
        return ok(f"{seen}; torch's CUDA {torch_cuda} runs on it", **facts)
    return ok(seen, **facts)


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdecimal() else 0


# What every card with memory of its own answers.
EXPECTED = (
    "name",
    "uuid",
    "driver_version",
    "compute_capability",
    "temperature_c",
    "sm_clock_mhz",
    "memory_total_mb",
    "memory_free_mb",
)


def check_gpu(context: DoctorContext) -> Finding:
    """Read every field once."""
    if context.settings.model.dtype == FLOAT8 and (refusal := _no_float8(context)) is not None:
        return split(fail, refusal)
    if context.gpu is not None:
        return judge_gpu(context.gpu)
    if context.has_gpu or context.cards:
        return warn(
            f"there is an NVIDIA GPU, and NVML says nothing of it: {context.no_gpu}",
            "In a container: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the "
            "driver's libraries.",
        )
    return ok("no NVIDIA GPU here")


def _no_float8(context: DoctorContext) -> str | None:
    if not context.wants_gpu:
        return no_float8("a CPU", None)
    known = context.gpu is not None and context.gpu.capability is not None
    return no_float8(context.gpu.name or "this card", context.gpu.capability) if known and context.gpu else None


def judge_gpu(gpu: GpuReading) -> Finding:
    """Missing fields are normal on a GB10 and its like, whose memory is the machine's."""
    missing = gpu.not_available or {}
    values = {
        field.name: _shown(gpu, field.name) if field.name not in missing else f"not available: {missing[field.name]}"
        for field in fields(gpu)
        if field.name != "not_available"
    }
    seen = f"{gpu.name}: {len(values) - len(missing)} fields"
    if missing:
        seen += f", and {len(missing)} are not available"
        seen += ", which is normal for it" if gpu.unified else ""
    unexpected = [name for name in EXPECTED if name in missing and not gpu.unified]
    if unexpected:
        return Finding(
            FindingStatus.WARN, f"{seen}: {', '.join(unexpected)} should be", "nvidia-smi -q", values, listed=True
        )
    return Finding(FindingStatus.OK, seen, None, values, listed=True)


def _shown(gpu: GpuReading, name: str) -> object:
    if name == "processes":
        of_all = (f"{process.pid}: {_megabytes(process.memory_mb)}" for process in gpu.processes or ())
        return ", ".join(of_all) or "none"
    if name == "clock_reasons":
        return ", ".join(gpu.clock_reasons or ()) or "none"
    return getattr(gpu, name)


def _megabytes(memory: int | None) -> str:
    return "memory not available" if memory is None else f"{memory} MB"


CLOCK_SECONDS = 30.0
LOOK_SECONDS = 5.0
HANGS = "If nvidia-smi hangs too, restart the machine; `sudo dmesg` may say why."


def check_clock(context: DoctorContext) -> Finding:
    """Read the clock during five seconds of matrix products."""
    if context.gpu is None:
        if context.has_gpu:
            return warn(f"cannot be read: {context.no_gpu}", "See the check gpu.")
        return ok("no NVIDIA GPU here")
    if not context.device.startswith("cuda"):
        if context.settings.engine.device in ("cpu", "mps"):
            return ok("not measured: DEVICE leaves the GPU unused")
        return warn("not measured: this torch cannot put a load on the GPU", "See the check torch.")
    looks = _Looks(context.gpu.uuid)
    load = context.prober.ask("load", context.device, Load, CLOCK_SECONDS, looks.look)
    if looks.hung:
        return fail(f"the driver did not answer within {LOOK_SECONDS:.0f} s under load", HANGS)
    return judge_clock(looks.readings, load)


class _Looks:
    """Readings of one GPU, until one hangs."""

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self.readings: list[GpuReading] = []
        self.hung = False

    def look(self) -> None:
        """Take a reading; none more after the driver hung."""
        if self.hung:
            return
        result = within(LOOK_SECONDS, lambda: reading(self._uuid))
        self.hung = result is None
        if isinstance(result, GpuReading):
            self.readings.append(result)


def judge_clock(readings: Sequence[GpuReading], load: Load) -> Finding:
    """Judge by the median reading under load: in the first ones the clock may still be rising."""
    under_load = sorted(
        (
            reading
            for reading in readings
            if reading.sm_clock_mhz is not None and (reading.utilization_percent or 0) >= LOADED_PERCENT
        ),
        key=lambda reading: reading.sm_clock_mhz or 0,
    )
    facts: dict[str, object] = {"seconds": load.seconds, "tflops": load.tflops, "readings": len(under_load)}
    if not under_load:
        return warn(
            f"no reading of {len(readings)} shows clock and load, so nothing is known", "nvidia-smi -q", **facts
        )
    middle = under_load[len(under_load) // 2]
    verdict = clock_verdict(middle)
    facts |= {
        "sm_clock_mhz": middle.sm_clock_mhz,
        "temperature_c": middle.temperature_c,
        "power_watts": middle.power_watts,
        "clock_reasons": middle.clock_reasons,
        "state": verdict.state.value,
    }
    seen = (
        f"{under_load[0].sm_clock_mhz} to {under_load[-1].sm_clock_mhz} MHz under load, "
        f"{_or_unknown(middle.power_watts)} W, {_or_unknown(middle.temperature_c)} °C, held by: "
        f"{', '.join(middle.clock_reasons or ()) or 'nothing'}"
    )
    return fail(seen, verdict.message, **facts) if verdict.bad else ok(seen, **facts)


def _or_unknown(number: float | None) -> str:
    return "unknown" if number is None else f"{number:g}"


MATMUL_SECONDS = 120.0
PEAKS = (  # the first that matches a whole name
    (r"H100 PCIe", 756),
    (r"H100 NVL|H200 NVL", 835),
    (r"H[12]00\b(?!.*MIG).*", 989),
    (r"A100\b(?!.*MIG).*", 312),
    (r"L40S", 362),
    (r"L4", 121),
    (r"GeForce RTX 4090", 165),
    (r"GeForce RTX 5090", 209),
    (r"RTX PRO 6000 Blackwell (Workstation|Server) Edition", 504),
    (r"RTX PRO 6000 Blackwell Max-Q.*", 439),
    (r"B200\b(?!.*MIG).*", 2250),
)
LEAST_SHARE = 0.5
GB10_GOOD, GB10_LEAST = 70, 40
SLOW_CURE = (
    "See the checks clock and torch; stop what else uses the GPU (nvidia-smi), and let it cool down, then\n"
    "vecmill doctor --only torch,clock,matmul"
)


def check_matmul(context: DoctorContext) -> Finding:
    """Measure matrix products."""
    device = context.device
    speed = context.prober.ask("matmul", device, MatmulSpeed, MATMUL_SECONDS)
    index = gpu_index(device)
    return judge_matmul(speed, context.build.gpus[index].name if device.startswith("cuda") else None)


def judge_matmul(speed: MatmulSpeed, card: str | None) -> Finding:
    """`card`: its name; None: a CPU, of which nothing is expected."""
    figure = speed.median
    seen = (
        f"{figure:.1f} TFLOPS ({min(speed.tflops):.1f} to {max(speed.tflops):.1f} in {len(speed.tflops)} timings) in "
        f"{speed.dtype}, {speed.size} x {speed.size}, on {card or 'the CPU'}"
    )
    facts = {"tflops": figure, "timings": speed.tflops, "size": speed.size, "dtype": speed.dtype}
    if card is None:
        return ok(seen, **facts)
    if "GB10" in card:
        seen += f"; {GB10_GOOD} to 95 is healthy"
        if figure < GB10_LEAST:
            return fail(f"{seen}: it is held back, or torch's CUDA is older than 13", SLOW_CURE, **facts)
        return ok(seen, **facts) if figure >= GB10_GOOD else warn(seen, SLOW_CURE, **facts)
    peak = peak_of(card)
    if peak is None:
        return ok(f"{seen}; what it should give is not known here", **facts)
    seen += f", {figure / peak:.0%} of its peak of {peak}"
    if figure < LEAST_SHARE * peak:
        return warn(f"{seen}; {LEAST_SHARE:.0%} and more is healthy", SLOW_CURE, **facts)
    return ok(seen, **facts)


def peak_of(card: str) -> int | None:
    """A card's peak in TFLOPS in bfloat16; None where it is not in the table."""
    name = card.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)
