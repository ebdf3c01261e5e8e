"""What checks share: each thing is looked at once in a round of checks, and only if a check asks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vecmill.config import Settings
from vecmill.core.address import url_here
from vecmill.core.errors import StartupError
from vecmill.core.threads import within
from vecmill.engine.probes.results import TorchBuild
from vecmill.hardware.gpu import GpuMemory, GpuReading, gpu_index, gpu_memory, nvidia_gpu_present
from vecmill.hardware.memory import meminfo
from vecmill.hardware.nvml import NvmlUnavailable, reading
from vecmill.models import hub
from vecmill.tools.doctor.probing import ProbeFailed, Prober
from vecmill.tools.http_client import get_here

COMMAND_SECONDS = 5.0
HEALTH_SECONDS = 1.0
BUILD_SECONDS = 120.0  # importing torch from a cold disk takes its time
NVML_SECONDS = 10.0
TORCH_CHECKS = frozenset({"torch", "driver", "matmul", "clock", "allocation", "attention", "compile"})
NVIDIA, DISPLAY = "0x10de", "0x03"  # a PCI device's vendor; the first byte of its class


class NoTorch(Exception):
    """Torch cannot be imported here: what needs it is not measured."""


class DoctorContext:
    """What the checks of one round share."""

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
        answer = within(NVML_SECONDS, lambda: reading(uuid))
        return answer or NvmlUnavailable(f"the driver did not answer within {NVML_SECONDS:.0f} s")

    def _uuid(self) -> str | None:
        if isinstance(self.torch_build, ProbeFailed) or not self.torch_build.gpus:
            return None
        index = gpu_index(self.settings.engine.device)
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
        """The GPU's memory; by the kernel's account where it shares the machine's."""
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
        index = gpu_index(wanted)
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
            answer = within(seconds, lambda: _plan(name, token, models.revision_of(name)))
            if answer is None:
                self._silent[name] = seconds
            else:
                self._plans[name] = answer
        silence = StartupError(f"{name}: the hub did not answer within {seconds:.0f} s: check the network.")
        return self._plans.get(name, silence)


def _plan(name: str, hf_token: str | None, revision: str | None) -> hub.Plan | StartupError:
    try:
        return hub.plan(name, hf_token=hf_token, revision=revision)
    except StartupError as error:
        return error


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended; with status None it did not, or could not be started."""

    status: int | None
    stdout: str
    problem: str
    """One line: why it is of no use, empty where it succeeded."""


def ended(*command: str) -> Ended:
    """Run a command for COMMAND_SECONDS at the most."""
    try:
        done = subprocess.run(  # noqa: S603  # found on the PATH, as from a shell
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Ended(None, "", f"`{_shown(command)}` did not answer within {COMMAND_SECONDS:.0f} s")
    except OSError as error:
        return Ended(None, "", f"`{_shown(command)}` cannot be run ({error.strerror})")
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit status {done.returncode}"]
    return Ended(done.returncode, done.stdout, lines[0] if done.returncode else "")


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)


def nvidia_cards(root: Path = Path("/")) -> list[str]:
    """The bus addresses of NVIDIA's GPUs, with or without a driver. `root` is the file system to look at."""
    addresses = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # it has just been taken away
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            addresses.append(device.name)
    return addresses


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Something that speaks HTTP there. `version` and `status` are /health's; None where it is not vecmill."""

    url: str
    status_code: int
    software: str | None
    """Its `Server` header."""
    version: str | None
    status: str | None
    loading: tuple[str, ...] = ()
    """Models that are not loaded yet."""

    @property
    def is_vecmill(self) -> bool:
        return self.version is not None


def server_at(host: str, port: int) -> RunningServer | None:
    """Ask /health; None where nothing answers in HTTP."""
    if port == 0:
        return None
    url = url_here(host, port)
    answer = get_here(f"{url}/health", HEALTH_SECONDS)
    if answer is None:
        return None
    try:
        health = answer.json() if "json" in answer.headers.get("content-type", "") else {}
    except ValueError:  # it says JSON and is none: another server
        health = {}
    ours = isinstance(health, dict) and {"version", "status", "embedding_models"} <= health.keys()
    return RunningServer(
        url,
        answer.status_code,
        answer.headers.get("server"),
        str(health["version"]) if ours else None,
        str(health["status"]) if ours else None,
        tuple(map(str, health.get("loading") or ())) if ours else (),
    )
