"""A thread that looks at the GPU every few seconds, so that nobody who asks waits for a driver.

A look is twenty calls, a few milliseconds: under 1 % of a core.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from vecmill.hardware.clocks import Clock, ClockVerdict, clock_verdict
from vecmill.hardware.gpu import GpuReading
from vecmill.hardware.nvml import Nvml, NvmlUnavailable

logger = logging.getLogger(__name__)

PERIOD = 2.0
# Looks in a row that must find a clock too low: one may fall into the moment in which a load begins.
BAD_LOOKS = 3
STALE_SECONDS = 30.0
CLOSE_PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """What the last look found; without a GPU, or a driver that answers, `gpu` is None and `reason` says why."""

    gpu: GpuReading | None
    clock: ClockVerdict
    reason: str | None = None


class Monitor:
    """Looks from `start` to `close`. Safe to ask from any thread."""

    def __init__(self, on_verdict: Callable[[ClockVerdict], None] = lambda verdict: None) -> None:
        """`on_verdict` is called, in the monitor's thread, when the clocks become bad and when they are well again."""
        self._on_verdict = on_verdict
        self._uuid: str | None = None
        self._found = _nothing("nobody has looked yet")
        self._at = monotonic()
        self._bad_looks = 0
        self._puzzled = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; returns at once, for a driver may take seconds to open."""
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()

    def watch(self, uuid: str | None) -> None:
        """Look at the GPU with this UUID from now on; None: at the first."""
        self._uuid = uuid
        self._bad_looks = 0

    def close(self) -> None:
        """End the thread; one that hangs in the driver is left behind."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE)

    def latest(self) -> Look:
        """The last look."""
        found, age = self._found, monotonic() - self._at
        if found.gpu is not None and age > STALE_SECONDS:
            return _nothing(f"the driver has not answered for {age:.0f} s")
        return found

    def _run(self) -> None:
        try:
            nvml = Nvml()
        except NvmlUnavailable as error:
            self._found = _nothing(str(error))
            return
        except Exception as error:
            logger.exception("the GPU's driver cannot be opened")
            self._found = _nothing(f"the driver cannot be opened ({type(error).__name__})")
            return
        self._look(nvml)
        while not self._end.wait(PERIOD):
            self._look(nvml)
        nvml.close()

    def _look(self, nvml: Nvml) -> None:
        try:
            gpu = nvml.read(self._uuid)
            self._found = Look(gpu, self._verdict(clock_verdict(gpu)))
        except NvmlUnavailable as error:
            self._found = self._missed(str(error))
        except Exception as error:  # the thread goes on: nobody else looks
            if not self._puzzled:
                logger.exception("the GPU cannot be read")
            self._puzzled = True
            self._found = self._missed(f"the GPU cannot be read ({type(error).__name__})")
        else:
            self._at = monotonic()
            self._puzzled = False

    def _missed(self, reason: str) -> Look:
        self._forget_unconfirmed()
        return _nothing(reason)

    def _forget_unconfirmed(self) -> None:
        """What has not been seen often enough in a row begins anew; what has stays until a loaded clock is well."""
        if self._bad_looks < BAD_LOOKS:
            self._bad_looks = 0

    def _verdict(self, verdict: ClockVerdict) -> ClockVerdict:
        was_bad = self._bad_looks >= BAD_LOOKS
        if verdict.bad:
            self._bad_looks += 1
            if self._bad_looks < BAD_LOOKS:
                return ClockVerdict(Clock.UNKNOWN, "the load has just begun")
            if not was_bad:
                self._on_verdict(verdict)
        elif verdict.state is Clock.OK:
            self._bad_looks = 0
            if was_bad:
                self._on_verdict(verdict)
        else:
            self._forget_unconfirmed()
        return verdict


def _nothing(reason: str) -> Look:
    return Look(None, clock_verdict(None), reason)
