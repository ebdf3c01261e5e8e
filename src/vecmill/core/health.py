"""The state of the process, written where it changes and read by whoever reports it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """`loading` → `ready` → `draining`, and from anywhere, for good, `failed`. Never the other way."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


Listener = Callable[[Phase, float, str], None]
ORDER = {phase: number for number, phase in enumerate(Phase)}


class Health:
    """Phase, progress of the start in percent, and one sentence. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = Phase.LOADING
        self._percent = 0.0
        self._message = "starting"
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call it after every change, in whatever thread changes; it must neither raise nor wait."""
        self._listeners.append(listener)

    def update(self, phase: Phase, percent: float, message: str) -> None:
        """Move on. What would lead back is dropped: a model may still load while the server stops."""
        with self._lock:
            if self._phase is Phase.FAILED or ORDER[phase] < ORDER[self._phase]:
                return
            self._phase, self._percent, self._message = phase, percent, message
        for listener in self._listeners:
            listener(phase, percent, message)

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
