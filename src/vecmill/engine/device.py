"""Which device, which type its weights get, what its memory says, and what to do when that runs out.

The type is never float16 unless asked: models trained in bfloat16 overflow in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch
from torch import nn

from vecmill.core.errors import StartupError, StartupObstacle, is_out_of_memory
from vecmill.hardware.gpu import AMPERE, FLOAT8, gpu_index, no_float8, nvidia_gpu_present
from vecmill.hardware.memory import (
    MEGABYTE,
    DeviceMemory,
    GpuRoom,
    host_memory,
    meminfo,
    memory_floor,
    unified_available,
)
from vecmill.models.prepacked_linears import prepacked


def choose_device(wanted: str) -> torch.device:
    """Resolve DEVICE.

    Raises:
        StartupError: the device is not there, or a GPU is present and this torch cannot use it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise StartupError("DEVICE=mps, but this torch sees no Apple GPU: set DEVICE=cpu or DEVICE=auto.")
        return torch.device("mps")
    if torch.cuda.is_available():
        return _cuda(wanted)
    if nvidia_gpu_present():
        raise _unusable_gpu()
    if wanted != "auto":
        raise StartupError(f"DEVICE={wanted}, but there is no CUDA GPU here: set DEVICE=cpu or DEVICE=auto.")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _cuda(wanted: str) -> torch.device:
    index = gpu_index(wanted)
    count = torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"DEVICE={wanted}, but there are {count} CUDA GPUs: set DEVICE=cuda:0 to cuda:{count - 1}.")
    return torch.device("cuda", index)


def _unusable_gpu() -> StartupError:
    if torch.version.cuda is None:
        return StartupError(
            f"There is an NVIDIA GPU here, but torch {torch.__version__} is a CPU-only build: install a CUDA build "
            f"(`pip install --force-reinstall 'torch>=2.11'`, CUDA 13 on a DGX Spark), or set DEVICE=cpu to serve "
            f"from the CPU."
        )
    return StartupObstacle(  # the driver may not be loaded yet when the machine starts
        f"There is an NVIDIA GPU here, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: "
        f"check the driver with `nvidia-smi` (CUDA 13 needs R580 or newer), or set DEVICE=cpu to serve from the CPU."
    )


def configure_device(device: torch.device, memory_fraction: float, memory_floor_gb: float | None = None) -> None:
    """TF32 for what is left in float32, no attention by cuDNN, and a bound on what torch takes of a GPU's memory.

    This one call sets TF32 on every torch from 1.12 on without mixing its old and its new settings. Not on a CPU: there
    it lets oneDNN round float32 to bfloat16.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: events, properties and workspaces default to the current one
        torch.set_float32_matmul_precision("high")
        # SDPA takes cuDNN first on an H100 or B200, and cuDNN plans anew for each shape that it has not seen. Batches
        # here have few shapes in common: on an H100 what takes 1.4 s took 45.
        torch.backends.cuda.enable_cudnn_sdp(False)
        limit_memory(device, memory_fraction, memory_floor_gb)


def limit_memory(device: torch.device, memory_fraction: float, memory_floor_gb: float | None) -> GpuRoom | None:
    """Bound what torch's allocator takes of a GPU by what is there now; None on anything else.

    Where CPU and GPU share their memory others may take it at any time, so the bound is set anew before each step that
    takes much. Past it torch raises and the step is made smaller; past the machine's end a GB10 freezes.
    """
    if device.type != "cuda":
        return None
    room = gpu_room(device, memory_fraction, memory_floor_gb)
    torch.cuda.set_per_process_memory_fraction(room.limit / room.total, device)
    return room


def gpu_room(device: torch.device, memory_fraction: float, memory_floor_gb: float | None) -> GpuRoom:
    """What there is of a GPU's memory now."""
    properties = torch.cuda.get_device_properties(device)
    total, reserved = properties.total_memory, torch.cuda.memory_reserved(device)
    unified = bool(properties.is_integrated)
    if unified:
        available = unified_available(meminfo())
        available = host_memory().available_mb * MEGABYTE if available is None else available
    else:
        available = torch.cuda.mem_get_info(device)[0]
    # A card's own memory has no floor: nothing else lives from it.
    floor = memory_floor(total, memory_floor_gb) if unified else 0
    return GpuRoom(total, reserved, available, int(floor), memory_fraction, unified)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device multiplies in bfloat16 without emulating it."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE


def check_type(wanted: str, device: torch.device) -> None:
    """Refuse a DTYPE that the device does not have.

    Raises:
        StartupError: it does not.
    """
    if wanted != FLOAT8:
        return
    is_card = device.type == "cuda" and torch.version.hip is None
    refusal = no_float8(describe(device), torch.cuda.get_device_capability(device) if is_card else None)
    if refusal is not None:
        raise StartupError(refusal)


def has_flash_attention(device: torch.device) -> bool:
    """Whether torch's flash kernels run on a CUDA device."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= AMPERE


def describe(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What torch holds on the device, in MB; None on a CPU, which has no memory of its own.

    Asks the driver, which may hang: not to be called in the event loop.
    """
    if device.type != "cuda":
        return None
    # torch's counters are read under the allocator's lock without letting go of Python's: where another thread has hung
    # in cudaMalloc, which holds the first, nothing in the process would run any more. An allocation waits for the lock
    # too, and lets the others run meanwhile.
    torch.empty(1, device=device)
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(
        total_mb=properties.total_memory // MEGABYTE,
        allocated_mb=torch.cuda.memory_allocated(device) // MEGABYTE,
        reserved_mb=torch.cuda.memory_reserved(device) // MEGABYTE,
        # cudaMemGetInfo counts the page cache as used where CPU and GPU share their memory.
        reported_free_mb=None if properties.is_integrated else torch.cuda.mem_get_info(device)[0] // MEGABYTE,
        unified=bool(properties.is_integrated),
    )


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID by which NVML knows the device (`GPU-...`); None for what is no GPU. Asks the driver."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


PROBE_ROWS, PROBE_RUNS = 512, 5
PROBE_EXPANSION = 4  # of a transformer's feed-forward layer, where most of the time goes


@dataclass(frozen=True, slots=True)
class ChosenDtype:
    """A dtype and the reason, for the start log and /health."""

    dtype: torch.dtype
    reason: str
    float8: bool = False
    """Whether linear layers are rounded to float8; the rest is `dtype`."""

    @property
    def name(self) -> str:
        """As clients are shown it."""
        return FLOAT8 if self.float8 else dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(wanted: str, device: torch.device, width: int) -> ChosenDtype:
    """The dtype by setting, by device or, on a CPU, by what is faster at a model's width."""
    if wanted == FLOAT8:
        check_type(wanted, device)
        return ChosenDtype(torch.bfloat16, "DTYPE=fp8", float8=True)
    if wanted != "auto":
        return ChosenDtype(getattr(torch, wanted), f"DTYPE={wanted}")
    if device.type == "cuda":
        if has_bfloat16(device):
            return ChosenDtype(torch.bfloat16, "range of float32 at the speed of 16 bits on this GPU")
        return ChosenDtype(torch.float32, "this GPU has no bfloat16, and float16 overflows")
    if device.type == "mps":
        return ChosenDtype(torch.float32, "the safe choice on MPS")
    return _fastest_on_cpu(width)


def expected_dtype(wanted: str, device: torch.device) -> ChosenDtype:
    """The dtype before it is chosen: on a CPU the smaller of those that may be, as long as nothing is measured."""
    if wanted == "auto" and device.type == "cpu":
        return ChosenDtype(torch.bfloat16, "expected: measured when it is loaded")
    return choose_dtype(wanted, device, 1)


CPU_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
# Models that share their weights must get the same type, so it is chosen once for a width.
_chosen_on_cpu: dict[int, ChosenDtype] = {}


def remember_on_cpu(width: int, chosen: ChosenDtype) -> None:
    """Have models of a width get the type that was chosen at an earlier start, unless this process has chosen."""
    _chosen_on_cpu.setdefault(width, chosen)


def _fastest_on_cpu(width: int) -> ChosenDtype:
    if width not in _chosen_on_cpu:
        rates = cpu_rates(width)
        fastest = max(rates, key=lambda dtype: rates[dtype])
        _chosen_on_cpu[width] = ChosenDtype(fastest, rates_in_words(rates, fastest))
    return _chosen_on_cpu[width]


def rates_in_words(rates: Mapping[torch.dtype, float], chosen: torch.dtype) -> str:
    """Why a type was chosen."""
    [(other, rate)] = [(dtype, rate) for dtype, rate in rates.items() if dtype is not chosen]
    return f"measured on this CPU: {rates[chosen]:,.0f} GFLOP/s, against {rate:,.0f} in {dtype_name(other)}"


@torch.inference_mode()
def cpu_rates(width: int, check: Callable[[], None] = lambda: None) -> dict[torch.dtype, float]:
    """GFLOP/s of a feed-forward layer in each type, as models have it; in turns, so that other work slows both.

    `check` is called before each run; what it raises ends the measurement.
    """
    layers = {dtype: _layer(width, dtype) for dtype in CPU_DTYPES.values()}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    for _ in range(PROBE_RUNS):
        for dtype, layer in layers.items():
            hidden = torch.full((PROBE_ROWS, width), 0.01, dtype=dtype)
            check()
            started = perf_counter()
            layer(hidden)
            seconds[dtype].append(perf_counter() - started)
    operations = 2 * 2 * PROBE_ROWS * width * width * PROBE_EXPANSION
    return {dtype: operations / min(taken) / 1e9 for dtype, taken in seconds.items()}


def _layer(width: int, dtype: torch.dtype) -> nn.Module:
    def linear(inputs: int, outputs: int) -> nn.Module:
        plain = nn.Linear(inputs, outputs, bias=False, device="meta")
        plain.weight = nn.Parameter(torch.full((outputs, inputs), 0.01, dtype=dtype), requires_grad=False)
        return prepacked(plain)

    return nn.Sequential(linear(width, PROBE_EXPANSION * width), nn.GELU(), linear(PROBE_EXPANSION * width, width))


T = TypeVar("T")


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What the function gives; None where it ran out of memory.

    Raises:
        Exception: what the function raised for any other reason.
    """
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Out here: the exception held the frames, and the frames what they had allocated.
    _give_back()
    return None


def _give_back() -> None:
    """Let go of what torch keeps for later, on every device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
