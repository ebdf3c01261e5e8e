"""A thread that looks at the GPU every few seconds, so that nobody who asks waits for a driver.

A look is twenty calls of NVML and three of torch, a few milliseconds: under 1 % of a core. All that anybody says of the
GPU is from the last look, with its age: a driver that hangs holds up this thread and no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

from vecmill.hardware.gpu import ClockState, ClockVerdict, GpuReading, clock_verdict
from vecmill.hardware.memory import DeviceMemory
from vecmill.hardware.nvml import Nvml, NvmlUnavailable

logger = logging.getLogger(__name__)

PERIOD = 2.0
# Looks in a row that must find a clock too low: one may fall into the moment in which a load begins.
BAD_LOOKS = 3
# A look takes milliseconds; opening a driver that nobody uses yet takes seconds.
STALE_SECONDS = 10.0
CLOSE_PATIENCE = 0.5
FIRST_LOOK_PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Look:
    """What the last look found; without a GPU, or a driver that answers, `gpu` is None and `reason` says why.

    `stale`: the look that is under way has taken far too long, so that nothing is known of now. What torch holds
    (`memory`, None before `watch` and on a CPU) is then still that of the last look, `age_seconds` ago.
    """

    gpu: GpuReading | None
    clock: ClockVerdict
    reason: str | None = None
    memory: DeviceMemory | None = None
    age_seconds: float = 0.0
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """The GPU that is in use. Both functions ask the driver: they may hang, and are called in the monitor's thread."""

    uuid: Callable[[], str | None]
    memory: Callable[[], DeviceMemory | None]


class Monitor:
    """Looks from `start` to `close`. Safe to ask from any thread."""

    def __init__(self, on_verdict: Callable[[ClockVerdict], None] = lambda verdict: None) -> None:
        """`on_verdict` is called, in the monitor's thread, when the clocks become bad and when they are well again."""
        self._on_verdict = on_verdict
        self._watched: Watched | None = None
        self._found = _nothing("nobody has looked yet")
        self._at = monotonic()
        self._looking_since: float | None = None
        self._bad_looks = 0
        self._end = False
        self._wake = threading.Event()
        self._looked = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; returns at once, for a driver may take seconds to open."""
        self._looking_since = monotonic()
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()

    def watch(self, watched: Watched) -> None:
        """Look at this GPU from now on, and at what torch holds of it.

        Returns after the first look at it, or after FIRST_LOOK_PATIENCE: not to be called in an event loop.
        """
        self._watched = watched
        self._wake.set()
        self._looked.wait(FIRST_LOOK_PATIENCE)

    def close(self) -> None:
        """End the thread; one that hangs in the driver is left behind."""
        self._end = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE)

    def latest(self) -> Look:
        """The last look, and how long ago that was. Asks nobody."""
        look, since, now = self._found, self._looking_since, monotonic()
        if since is None or now - since <= STALE_SECONDS:
            return replace(look, age_seconds=now - self._at)
        hanging = _nothing(f"the driver has not answered for {now - since:.0f} s")
        return replace(hanging, memory=look.memory, age_seconds=now - self._at, stale=True)

    def _run(self) -> None:
        nvml, reason = _opened()
        while not self._end:
            self._wake.clear()
            watched = self._watched
            self._looking_since = monotonic()
            look = self._look(nvml, reason, watched)
            self._found, self._at, self._looking_since = look, monotonic(), None
            if watched is not None:
                self._looked.set()
            # Without a driver there is nothing to look at before torch has a GPU, which need not be NVIDIA's.
            self._wake.wait(PERIOD if nvml is not None or watched is not None else None)
        if nvml is not None:
            nvml.close()

    def _look(self, nvml: Nvml | None, reason: str, watched: Watched | None) -> Look:
        memory = None
        try:
            uuid, memory = (watched.uuid(), watched.memory()) if watched is not None else (None, None)
            if nvml is None:
                return replace(_nothing(reason), memory=memory)
            gpu = nvml.read(uuid)
        except NvmlUnavailable as error:
            return replace(self._missed(str(error)), memory=memory)
        except Exception as error:  # torch's, of a device that has failed; the thread goes on: nobody else looks
            if self._found.reason is None:
                logger.warning("the GPU cannot be looked at: %s: %s", type(error).__name__, error)
            return self._missed(f"the GPU cannot be looked at ({type(error).__name__})")
        return Look(gpu, self._verdict(clock_verdict(gpu)), memory=memory)

    def _missed(self, reason: str) -> Look:
        self._forget_unconfirmed()
        return _nothing(reason)

    def _forget_unconfirmed(self) -> None:
        """Reset the count of bad looks unless it has reached BAD_LOOKS.

        From then on the verdict stands until a look under load finds the clocks right.
        """
        if self._bad_looks < BAD_LOOKS:
            self._bad_looks = 0

    def _verdict(self, verdict: ClockVerdict) -> ClockVerdict:
        was_bad = self._bad_looks >= BAD_LOOKS
        if verdict.bad:
            self._bad_looks += 1
            if self._bad_looks < BAD_LOOKS:
                return ClockVerdict(ClockState.UNKNOWN, "the load has just begun")
            if not was_bad:
                self._on_verdict(verdict)
        elif verdict.state is ClockState.OK:
            self._bad_looks = 0
            if was_bad:
                self._on_verdict(verdict)
        else:
            self._forget_unconfirmed()
        return verdict


def _opened() -> tuple[Nvml | None, str]:
    """NVML, or why there is none."""
    try:
        return Nvml(), ""
    except NvmlUnavailable as error:
        return None, str(error)
    except Exception as error:
        logger.exception("the GPU's driver cannot be opened")
        return None, f"the driver cannot be opened ({type(error).__name__})"


def _nothing(reason: str) -> Look:
    return Look(None, clock_verdict(None), reason)
