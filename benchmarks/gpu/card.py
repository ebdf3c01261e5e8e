"""The card: what it is, and the clocks, power and temperature it has while it works, as nvidia-smi reads them."""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

FACTS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
SAMPLED = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
SAMPLE_MILLISECONDS = 500

Samples = list[list[str]]
"""One entry each time nvidia-smi answered: its fields, in SAMPLED's order."""


def describe_card(device: torch.device) -> dict[str, Any] | None:
    """Name, memory in GB, architecture, CUDA and driver; None on a CPU. What nvidia-smi does not know is left out."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    smi = _nvidia_smi(device, FACTS)
    said = _once(smi)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "shared_with_cpu": bool(properties.is_integrated),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **{name: value for name, value in zip(FACTS, said, strict=False) if not _unknown(value)},
    }


@contextmanager
def sampled(device: torch.device) -> Iterator[Samples]:
    """Clocks, power and temperature twice a second, as long as the block runs; nothing where there is no nvidia-smi."""
    samples: Samples = []
    process = _start([*_nvidia_smi(device, tuple(SAMPLED)), f"--loop-ms={SAMPLE_MILLISECONDS}"], device)
    if process is None:
        yield samples
        return
    reader = threading.Thread(target=_read, args=(process, samples), daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.kill()
        process.wait()
        reader.join()


def summary(samples: Sequence[Sequence[str]]) -> Mapping[str, Mapping[str, float]]:
    """Median and range of each reading; without those that the card does not give."""
    found = {}
    for position, name in enumerate(SAMPLED.values()):
        values = [float(sample[position]) for sample in samples if not _unknown(sample[position])]
        if values:
            found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found


def _nvidia_smi(device: torch.device, fields: Sequence[str]) -> list[str]:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    # By UUID: CUDA_VISIBLE_DEVICES changes torch's numbers and not nvidia-smi's.
    which = [f"--id=GPU-{uuid}"] if uuid else []
    return ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _once(command: Sequence[str]) -> list[str]:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return _fields(output.splitlines()[0]) if output.strip() else []


def _start(command: Sequence[str], device: torch.device) -> subprocess.Popen[str] | None:
    if device.type != "cuda":
        return None
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _read(process: subprocess.Popen[str], samples: Samples) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if len(fields := _fields(line)) == len(SAMPLED):  # an error message has other words
            samples.append(fields)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split(",")]


def _unknown(value: str) -> bool:
    """[N/A], [Not Supported] and the like."""
    return not value or value.startswith("[")
