"""A run in stages within a time: what there is no time for is left out, and what fails does not end the run."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from benchmarks.lib.figures import significant

FACTS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
SAMPLED = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
SAMPLE_MILLISECONDS = 500

Samples = list[list[str]]
"""One entry each time nvidia-smi answered: its fields, in SAMPLED's order."""
Result = TypeVar("Result")


def describe_card(device: torch.device) -> dict[str, Any] | None:
    """Name, memory in GB, architecture, CUDA and driver; None on a CPU. What nvidia-smi does not know is left out."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    smi = _nvidia_smi(device, FACTS)
    answer = _once(smi)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "shared_with_cpu": bool(properties.is_integrated),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **{name: value for name, value in zip(FACTS, answer, strict=False) if not _unknown(value)},
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
    readings = {}
    for position, name in enumerate(SAMPLED.values()):
        values = [float(sample[position]) for sample in samples if not _unknown(sample[position])]
        if values:
            readings[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return readings


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


class Stages:
    """Runs stages one by one and records how each ended, for the output and the JSON."""

    def __init__(
        self, ends: float, device: torch.device, samples: Samples, keep: Callable[[], None] = lambda: None
    ) -> None:
        """`keep` is called before each stage, once the result of the previous one is stored."""
        self._ends = ends  # by time.perf_counter
        self._device = device
        self._keep = keep
        self._samples = samples
        self.records: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return self._ends - time.perf_counter()

    @property
    def failed(self) -> bool:
        """Whether any stage failed."""
        return any(record["status"] == "failed" for record in self.records)

    def run(self, name: str, needs: float, function: Callable[[], Result]) -> Result | None:
        """The function's result; None if fewer seconds are left than it needs, or if it raised."""
        if needs > self.left:
            self.skip(name, f"needs about {needs:.0f} s, {max(self.left, 0):.0f} s are left")
            return None
        self._keep()
        self._say(name)
        first_sample, started = len(self._samples), time.perf_counter()
        result, error = self._attempt(function)
        record: dict[str, Any] = {
            "stage": name,
            "status": "failed" if error else "done",
            "seconds": significant(time.perf_counter() - started),
            "needed_about": significant(needs),
            "peak_memory_gb": self._peak_gb(),
            "card": summary(self._samples[first_sample:]),
        }
        if error:
            record["reason"] = error
            self._say(f"{name} FAILED: {error}")
        self.records.append(record)
        return result

    def guard(self, name: str, function: Callable[[], None]) -> None:
        """Run a function that runs stages of its own. Records only an error that is raised between them."""
        _, error = self._attempt(function)
        if error:
            self._say(f"{name} FAILED: {error}")
            self.records.append({"stage": name, "status": "failed", "reason": error})

    def skip(self, name: str, reason: str) -> None:
        """Leave a stage out, and say so."""
        self._say(f"{name} SKIPPED: {reason}")
        self.records.append({"stage": name, "status": "skipped", "reason": reason})

    def _say(self, text: str) -> None:
        print(f"[{self.left:4.0f} s left] {text}", file=sys.stderr, flush=True)

    def _attempt(self, function: Callable[[], Result]) -> tuple[Result | None, str | None]:
        """The error as text only: the exception's frames would hold the model in memory."""
        try:
            self._reset()
            return function(), None
        except Exception as error:  # any: the stages after it shall still run
            traceback.print_exc()
            return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def _reset(self) -> None:
        """Free unused memory and reset the peak."""
        gc.collect()  # compiled layers and their calls refer to each other
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak_gb(self) -> float | None:
        """Most that tensors took on the device in this stage; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return significant(torch.cuda.max_memory_allocated(self._device) / 1e9)
