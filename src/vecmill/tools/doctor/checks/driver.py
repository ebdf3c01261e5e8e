"""The NVIDIA driver, against what torch needs of it.

Source: https://docs.nvidia.com/deploy/cuda-compatibility: CUDA 13 needs R580, CUDA 12 R525; a driver for CUDA 13.0 runs
what was built with any 13.x.
"""

from __future__ import annotations

from vecmill.tools.doctor.context import Context, NoTorch
from vecmill.tools.doctor.report import Finding, fail, ok, warn

OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version
NOT_THE_GPU = "or set DEVICE=cpu to serve from the CPU"
UPDATE = f"sudo apt update && sudo apt full-upgrade, then sudo reboot (a DGX Spark), {NOT_THE_GPU}"


def check(context: Context) -> Finding:
    """Ask NVML, the kernel and the PCI bus."""
    if context.gpu is not None:
        try:
            torch_cuda = context.build.cuda
        except NoTorch:
            torch_cuda = None
        return judge(context.gpu.driver_version, context.gpu.cuda_version, torch_cuda)
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


def judge(version: str | None, cuda: str | None, torch_cuda: str | None) -> Finding:
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
