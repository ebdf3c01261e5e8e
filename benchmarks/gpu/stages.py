"""A run in stages within a time: what there is no time for is left out, and what fails does not end the run."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from benchmarks.gpu_card import Samples, summary
from benchmarks.model_rounds import significant

Found = TypeVar("Found")


class Stages:
    """Runs them one by one and keeps what became of each, for the output and the JSON."""

    def __init__(
        self, ends: float, device: torch.device, samples: Samples, keep: Callable[[], None] = lambda: None
    ) -> None:
        """`keep` is called before each stage, when what the one before found is in its place."""
        self._ends = ends  # by time.perf_counter
        self._device = device
        self._keep = keep
        self._samples = samples
        self.records: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self._ends - time.perf_counter()

    @property
    def failed(self) -> bool:
        """Whether any stage has."""
        return any(record["status"] == "failed" for record in self.records)

    def run(self, name: str, needs: float, function: Callable[[], Found]) -> Found | None:
        """What the function returns; None where the seconds that it needs are not left, or where it raised."""
        if needs > self.left:
            self.skip(name, f"needs about {needs:.0f} s, {max(self.left, 0):.0f} s are left")
            return None
        self._keep()
        self._say(name)
        first_sample, started = len(self._samples), time.perf_counter()
        found, error = self._attempt(function)
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
        return found

    def guard(self, name: str, function: Callable[[], None]) -> None:
        """Run what has stages of its own; only that it failed between them is worth a record."""
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

    def _attempt(self, function: Callable[[], Found]) -> tuple[Found | None, str | None]:
        """The error as text only: the exception's frames would hold the model in memory."""
        try:
            self._reset()
            return function(), None
        except Exception as error:  # any: what is measured after it is worth having all the same
            traceback.print_exc()
            return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def _reset(self) -> None:
        """A new peak of memory, and nothing kept for what is gone."""
        gc.collect()  # compiled layers and their calls hold each other
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak_gb(self) -> float | None:
        """Most that tensors took on the device in this stage; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return significant(torch.cuda.max_memory_allocated(self._device) / 1e9)
