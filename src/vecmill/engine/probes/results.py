"""What the probes find. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    uuid: str | None
    """As NVML writes it, `GPU-...`."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """How torch was built, and what it can use here."""

    version: str
    cuda: str | None
    """The CUDA version it was built with; None: a build for the CPU, or for another maker's GPU."""
    hip: str | None
    arch_list: tuple[str, ...]
    """`sm_NN` has machine code, `compute_NN` code that the driver compiles; empty where CUDA cannot be used."""
    gpus: tuple[GpuSeen, ...]
    cuda_error: str | None
    """Why CUDA cannot be used; None where it can, or where torch has none."""
    mps: bool = False
    """Whether it can use an Apple GPU."""


@dataclass(frozen=True, slots=True)
class ClaimedMemory:
    """What cudaMemGetInfo says, in bytes."""

    free: int
    total: int
    integrated: bool


@dataclass(frozen=True, slots=True)
class MatmulSpeed:
    """Square matrix products, each timing by itself."""

    device: str
    dtype: str
    size: int
    tflops: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.tflops)


@dataclass(frozen=True, slots=True)
class Load:
    """Matrix products for a while."""

    seconds: float
    tflops: float


@dataclass(frozen=True, slots=True)
class AttentionComparison:
    """The server's attention over ragged rows, against SDPA row by row."""

    varlen: bool
    """Whether the server's is `varlen_attn`; else it is SDPA once for each length."""
    dtype: str
    rows: int
    tokens: int
    largest_difference: float | None
    """None where a value is not a number."""
    seconds: float
    sdpa_seconds: float

    @property
    def speedup(self) -> float:
        """Times that the server's attention is as fast as SDPA row by row."""
        return self.sdpa_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class CompileTry:
    """A compiled function."""

    seconds: float
    """Until it had run once."""
    largest_difference: float | None
    """Between its values and those of the function as it is written; None where one is not a number."""


@dataclass(frozen=True, slots=True)
class Oversized:
    """An allocation above the cap that the process had set itself."""

    cap: int
    requested: int
    refused: str | None
    """The class of the exception; None: it was allocated."""
    seconds: float
    works_after: bool
    """Whether the device computes afterwards, with the cap taken back."""
