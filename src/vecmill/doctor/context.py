"""What checks share: each thing is looked at once in a round of checks, and only if a check asks."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cached_property

from vecmill.config import Settings
from vecmill.core.errors import StartupError
from vecmill.doctor.pci import nvidia_cards
from vecmill.doctor.probing import ProbeFailed, Prober
from vecmill.doctor.running import RunningServer, server_at
from vecmill.doctor.timely import within
from vecmill.engine.probes.results import TorchBuild
from vecmill.hardware.gpu import GpuMemory, GpuReading, gpu_memory, nvidia_gpu_present
from vecmill.hardware.memory import meminfo
from vecmill.hardware.nvml import Nvml, NvmlUnavailable
from vecmill.models import hub

BUILD_SECONDS = 120.0  # importing torch from a cold disk takes its time
NVML_SECONDS = 10.0
TORCH_CHECKS = frozenset({"torch", "driver", "matmul", "clock", "allocation", "attention", "compile"})


class NoTorch(Exception):
    """Torch cannot be imported here: what needs it is not measured."""


class Context:
    """For one round."""

    def __init__(self, settings: Settings, prober: Prober, names: Collection[str]) -> None:
        """`names`: the checks of the round."""
        self.settings = settings
        self.prober = prober
        self.uses_torch = not TORCH_CHECKS.isdisjoint(names)
        """Whether torch is imported anyway; a round without it must be fast."""
        self._plans: dict[str, hub.Plan | StartupError] = {}
        self._silent: dict[str, float] = {}

    @cached_property
    def torch_build(self) -> TorchBuild | ProbeFailed:
        """How torch was built, or why it cannot be imported."""
        try:
            return self.prober.ask("build", "cpu", TorchBuild, BUILD_SECONDS)
        except ProbeFailed as error:
            return error

    @property
    def build(self) -> TorchBuild:
        """How torch was built.

        Raises:
            NoTorch: it cannot be imported.
        """
        if isinstance(self.torch_build, ProbeFailed):
            raise NoTorch(str(self.torch_build))
        return self.torch_build

    @cached_property
    def _gpu(self) -> GpuReading | NvmlUnavailable:
        uuid = self._uuid() if self.uses_torch else None
        found = within(NVML_SECONDS, lambda: reading(uuid))
        return found or NvmlUnavailable(f"the driver did not answer within {NVML_SECONDS:.0f} s")

    def _uuid(self) -> str | None:
        if isinstance(self.torch_build, ProbeFailed) or not self.torch_build.gpus:
            return None
        index = int(self.settings.engine.device.partition(":")[2] or 0)
        return self.torch_build.gpus[index].uuid if index < len(self.torch_build.gpus) else None

    @property
    def gpu(self) -> GpuReading | None:
        """What NVML says; None where it says nothing."""
        return self._gpu if isinstance(self._gpu, GpuReading) else None

    @property
    def no_gpu(self) -> str:
        """Why NVML says nothing."""
        return str(self._gpu) if isinstance(self._gpu, NvmlUnavailable) else ""

    @cached_property
    def gpu_memory(self) -> GpuMemory:
        """What the GPU has, by the kernel's account where it shares the machine's memory."""
        return gpu_memory(self.gpu, None, meminfo(), os.getpid())

    @cached_property
    def cards(self) -> list[str]:
        """NVIDIA's GPUs on the PCI bus, with or without a driver."""
        return nvidia_cards()

    @cached_property
    def has_gpu(self) -> bool:
        """Whether the NVIDIA driver has a GPU."""
        return self.gpu is not None or nvidia_gpu_present()

    @property
    def wants_gpu(self) -> bool:
        """Whether the server is to run on an NVIDIA GPU, as far as can be told without torch."""
        device = self.settings.engine.device
        return device.startswith("cuda") or (device == "auto" and self.has_gpu)

    @property
    def device(self) -> str:
        """The device that probes run on: a GPU only where this torch can use it."""
        wanted = self.settings.engine.device
        index = int(wanted.partition(":")[2] or 0)
        return f"cuda:{index}" if wanted not in ("cpu", "mps") and index < len(self.build.gpus) else "cpu"

    @cached_property
    def server(self) -> RunningServer | None:
        """The server that answers at HOST and PORT."""
        return server_at(self.settings.http.host, self.settings.http.port)

    def plan(self, name: str, seconds: float) -> hub.Plan | StartupError:
        """What the hub says of a model, or why it says nothing within so many seconds."""
        if name not in self._plans and self._silent.get(name, 0.0) < seconds:
            models = self.settings.model
            token = models.hf_token.get_secret_value() if models.hf_token else None
            found = within(seconds, lambda: _plan(name, token, models.revision_of(name)))
            if found is None:
                self._silent[name] = seconds
            else:
                self._plans[name] = found
        silence = StartupError(f"{name}: the hub did not answer within {seconds:.0f} s: check the network.")
        return self._plans.get(name, silence)


def reading(uuid: str | None) -> GpuReading | NvmlUnavailable:
    """One look at a GPU, or why there is none. May hang in the driver."""
    try:
        nvml = Nvml()
    except NvmlUnavailable as error:
        return error
    try:
        return nvml.read(uuid)
    except NvmlUnavailable as error:
        return error
    finally:
        nvml.close()


def _plan(name: str, hf_token: str | None, revision: str | None) -> hub.Plan | StartupError:
    try:
        return hub.plan(name, hf_token=hf_token, revision=revision)
    except StartupError as error:
        return error
