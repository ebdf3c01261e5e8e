"""What goes into the history every ten seconds, and the file in STATE_DIR that it is kept in."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time

from vecmill.core.types import Lane
from vecmill.hardware.gpu import GpuReading
from vecmill.http.dashboard.machine import Machine
from vecmill.http.services import Services
from vecmill.inference.facade import Inference
from vecmill.storage.files import write_atomically
from vecmill.telemetry.history import STEP_SECONDS, History, UnreadableHistory
from vecmill.telemetry.rates import Passes, Work, minus

logger = logging.getLogger(__name__)

WRITE_SECONDS = 60.0
LATE_SECONDS = 0.05  # after a step's end: timers are a little early at times, and would have the step counted twice
FILE, ASIDE = "history", ".unreadable"
LARGEST = 16 * 2**20  # bytes of a file; what is larger is no history


@dataclass(frozen=True, slots=True)
class _Counted:
    """Totals since the server's start, and when they were read."""

    at: float
    work: Work
    passes: Passes
    errors: int
    refused: int


def waiting_tokens(inference: Inference, lane: Lane) -> int:
    """Tokens that wait for a batch in a lane, of all models."""
    return sum(tokens for (_, queued_in), (_, tokens) in inference.queued.items() if queued_in is lane)


def until_next_look(now: float) -> float:
    """Seconds, from a Unix time, until the present step has certainly ended."""
    return STEP_SECONDS - now % STEP_SECONDS + LATE_SECONDS


class Sampler:
    """Fills the history from `start` to `close`. Belongs to the event loop's thread."""

    def __init__(self, services: Services, machine: Machine, replica: str) -> None:
        self.history = History()
        self._services, self._machine = services, machine
        self._replica = replica
        self._before = self._counted()
        self._written_at = -WRITE_SECONDS  # the first step is written at once
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with what was kept, and begin to look. Never raises."""
        if (path := self._path()) is not None:
            kept = await asyncio.to_thread(_read, path)
            self.history = self.history if kept is None else kept
        self._task = asyncio.create_task(self._look_again_and_again(), name="history")

    async def close(self) -> None:
        """Write what there is. STATE_DIR must still be held."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            self._record(time())
            await self._write()
        except Exception:  # the stop goes on
            logger.exception("the last step of the history is left out")

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(until_next_look(time()))
            try:
                self._record(time() - STEP_SECONDS / 2)
                if monotonic() - self._written_at >= WRITE_SECONDS:
                    await self._write()
            except Exception:  # the history must not end with one value that cannot be read
                logger.exception("a step of the history is left out")

    def _record(self, at: float) -> None:
        """The step in which `at` is."""
        before, self._before = self._before, self._counted()
        seconds = self._before.at - before.at
        values = self._rates(before, self._before) | self._latencies(seconds) | self._now()
        self.history.add(at, values, seconds)

    def _counted(self) -> _Counted:
        rolling, rates = self._services.telemetry.rolling, self._services.telemetry.rates
        return _Counted(monotonic(), rates.all_work, rates.all_passes, rolling.errors, rolling.refused)

    def _rates(self, before: _Counted, now: _Counted) -> dict[str, float | None]:
        seconds = max(now.at - before.at, 1e-3)
        work, passes = minus(now.work, before.work), minus(now.passes, before.passes)
        caches = self._services.cache() is not None
        return {
            "texts_per_second": work.texts / seconds,
            "tokens_per_second": work.tokens / seconds,
            "requests_per_second": work.requests / seconds,
            "searches_per_second": work.searches / seconds,
            "cache_hit_ratio": work.cached_texts / work.texts if work.texts and caches else None,
            "tokens_saved_per_second": work.cached_tokens / seconds if caches else None,
            "tokens_per_pass": passes.tokens_per_pass,
            "batch_fill_ratio": passes.fill_ratio,
            "device_busy_ratio": min(1.0, passes.seconds / seconds),
            "errors": now.errors - before.errors,
            "refused": now.refused - before.refused,
        }

    def _latencies(self, seconds: float) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for lane in Lane:
            latency = self._services.telemetry.rolling.recent_latency_ms(lane, seconds)
            values |= {f"{lane.value}_{name}_ms": latency[name] for name in ("p50", "p95")}
        return values

    def _now(self) -> dict[str, float | None]:
        inference, gpu, memory = self._services.inference, self._services.gpu().gpu, self._machine.memory()
        gpu = gpu or GpuReading()
        return {
            **{f"{lane.value}_queue_texts": count for lane, count in inference.waiting.items()},
            **{f"{lane.value}_queue_tokens": waiting_tokens(inference, lane) for lane in Lane},
            "memory_ours_bytes": memory.ours,
            "memory_page_cache_bytes": memory.page_cache,
            "memory_free_bytes": memory.free,
            "gpu_utilization_ratio": gpu.utilization_ratio,
            "gpu_power_watts": gpu.power_watts,
            "gpu_sm_clock_mhz": gpu.sm_clock_mhz,
            "gpu_temperature_c": gpu.temperature_c,
        }

    def _path(self) -> Path | None:
        """The file; None where nothing can be kept. Servers that share a folder have one each."""
        folder = self._services.state()
        if folder is None:
            return None
        shared = self._services.settings.state.redis_url is not None
        return folder.file(f"{FILE}-{_file_name(self._replica)}" if shared else FILE)

    async def _write(self) -> None:
        self._written_at = monotonic()
        if (path := self._path()) is None:
            return
        copy = self.history.copy()
        try:
            await asyncio.to_thread(lambda: write_atomically(path, copy.to_bytes()))
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("the history cannot be written to %s (%s)", path, error.strerror)
            self._failing = True


def _file_name(replica: str) -> str:
    """A name as a part of a file's; different ones stay different, but for `:` and `-`."""
    return re.sub("[^A-Za-z0-9.-]", lambda one: "-" if one[0] == ":" else f"_{ord(one[0]):x}_", replica)


def _read(path: Path) -> History | None:
    """What a file holds; one that cannot be used is set aside, so that it is not written over."""
    try:
        if path.stat().st_size > LARGEST:
            raise UnreadableHistory("it is too large")
        return History.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the history in %s cannot be read (%s): it begins anew", path, error.strerror)
    except UnreadableHistory as error:
        aside = path.with_name(path.name + ASIDE)
        logger.warning("the history in %s cannot be used (%s): it is set aside as %s", path, error, aside.name)
        with suppress(OSError):
            path.replace(aside)
    return None
