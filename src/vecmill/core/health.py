"""The state of the process, written where it changes and read by whoever reports it."""

from __future__ import annotations

import threading
from enum import StrEnum


class Phase(StrEnum):
    """`loading` → `ready` → `draining`; `failed` from anywhere and for good."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Health:
    """Phase, progress of the start in percent, and one sentence. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = Phase.LOADING
        self._percent = 0.0
        self._message = "starting"

    def update(self, phase: Phase, percent: float, message: str) -> None:
        """Move on. Nothing follows `failed`."""
        with self._lock:
            if self._phase is Phase.FAILED:
                return
            self._phase, self._percent, self._message = phase, percent, message

    def fail(self, message: str) -> None:
        """Record the first failure; it stays."""
        self.update(Phase.FAILED, self._percent, message)

    @property
    def ready(self) -> bool:
        return self._phase is Phase.READY

    def snapshot(self) -> tuple[Phase, float, str]:
        """Phase, percent, message, read together."""
        with self._lock:
            return self._phase, self._percent, self._message
