"""The thread that owns the device. Others hand it batches; every batch is answered, also when the thread dies.

While one batch runs, the next is packed and copied by another thread. On CUDA the thread launches a batch while the one
before it still runs, and a third thread waits for the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.errors import EngineFailed
from vecmill.core.protocols import BatchResult
from vecmill.core.types import Lane, Row
from vecmill.engine.device import device_memory, gpu_uuid
from vecmill.engine.forward import Launched, collect, launch
from vecmill.engine.loaded import Loaded
from vecmill.engine.loader import Report, load
from vecmill.engine.progress import Progress
from vecmill.hardware.memory import DeviceMemory
from vecmill.models.packing import PackedBatch, pack

logger = logging.getLogger(__name__)

# On CUDA: one runs, one is queued behind it. More would only stand between an interactive batch and the device.
LAUNCHED_AT_A_TIME = 2
# Who leaves the inbox first.
PROBE, CLOSE = -1, 9
ORDER = {Lane.INTERACTIVE: 0, Lane.BULK: 1}


@dataclass(slots=True)
class Work:
    """One batch, and who waits for it."""

    model: str
    rows: Sequence[Row]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[BatchResult]
    packed: PackedBatch | None = None

    def resolve(self, result: BatchResult | Exception) -> None:
        """Answer from another thread; the event loop may be gone by now."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: BatchResult | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class Engine:
    """A `Runner` on a device. `loaded` resolves once the models are warm, or with what went wrong."""

    def __init__(self, models: ModelSettings, engine: EngineSettings, report: Report) -> None:
        self.loaded: Future[Loaded] = Future()
        self._model_settings = models
        self._settings = engine
        self._report = report
        # (order, number, work): numbers keep equals in order. None closes, or probes.
        self._inbox: queue.PriorityQueue[tuple[int, int, Work | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._progress = Progress()
        self._last_done = 0.0
        self._launched = threading.Semaphore(LAUNCHED_AT_A_TIME)
        self._copies: torch.cuda.Stream | None = None
        self._packing = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._collecting = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._thread = threading.Thread(target=self._own_device, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batches that it has been given."""
        self._after_packing(self._close)

    def _close(self) -> None:
        with self._lock:
            self._failure = self._failure or "503: the server is shutting down."
            self._inbox.put((CLOSE, next(self._numbers), None))

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device now."""
        return len(self._progress) > 0

    @property
    def hung(self) -> str | None:
        """What the device has been at for far too long; None while it gets on."""
        return self._progress.hung()

    @property
    def alive(self) -> bool:
        """Whether the device's thread has not ended, be it that it loads."""
        return self._thread.is_alive()

    def memory(self) -> DeviceMemory | None:
        """The device's own memory; None before it is loaded and on a CPU."""
        if not self.loaded.done() or self.loaded.exception() is not None:
            return None
        return device_memory(self.loaded.result().device)

    def gpu_uuid(self) -> str | None:
        """The UUID of the GPU that the loaded models are on; None on a CPU."""
        return gpu_uuid(self.loaded.result().device)

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        """Run one forward pass; interactive ones overtake bulk that has not begun.

        Raises:
            EngineFailed: the device's thread has ended.
            Exception: what the forward pass raised; the engine goes on.
        """
        loop = asyncio.get_running_loop()
        work = Work(model, rows, loop, loop.create_future())
        # A shared prefix may be computed by the very batch that runs now: what has one is packed when its turn comes.
        if self.busy and all(row.prefix is None for row in rows):
            self._after_packing(partial(self._pack_and_queue, work, lane))
        else:
            self._queue(work, lane)
        with self._progress.of(self._expected_seconds(model, rows)):
            return await work.answer

    def _expected_seconds(self, model: str, rows: Sequence[Row]) -> float:
        return self.loaded.result().warmed[model].calibration.seconds(sum(map(len, rows)))

    def _after_packing(self, function: Callable[[], None]) -> None:
        """Call in the packing thread, in order; nothing is packed any more once the device's thread has ended."""
        try:
            self._packing.submit(function)
        except RuntimeError:
            function()

    def _pack_and_queue(self, work: Work, lane: Lane) -> None:
        # What goes wrong here goes wrong again on the device's thread, which answers for it.
        with contextlib.suppress(Exception):
            work.packed = self._pack(work.rows)
        self._queue(work, lane)

    def _queue(self, work: Work, lane: Lane) -> None:
        with self._lock:
            if self._failure is None:
                self._inbox.put((ORDER[lane], next(self._numbers), work))
            else:
                work.resolve(EngineFailed(self._failure))

    def _pack(self, rows: Sequence[Row]) -> PackedBatch:
        """Pack and copy on a stream of its own: a copy on the forward pass's stream would wait for that."""
        device = self.loaded.result().device
        if device.type != "cuda":
            return pack(rows, device)
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            packed = pack(rows, device)
        self._copies.synchronize()
        return packed

    def _own_device(self) -> None:
        try:
            loaded = load(self._model_settings, self._settings, self._report)
        except BaseException as error:
            self._die("503: the model could not be loaded.")
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(loaded)
        work: Work | None = None
        try:
            while (taken := self._inbox.get())[0] != CLOSE:
                work = taken[2]
                if work is None:
                    self._probe(loaded)
                else:
                    self._execute(loaded, work)
            self._end()
        except BaseException as error:
            logger.critical("the device's thread ended", exc_info=error)
            reason = f"503: the device has failed ({type(error).__name__}) and the server must be restarted."
            if work is not None:
                work.resolve(EngineFailed(reason))
            self._die(reason)

    def _die(self, reason: str) -> None:
        """Refuse new work and answer all that is in the inbox."""
        with self._lock:
            self._failure = reason
        self._end()
        while not self._inbox.empty():
            if (work := self._inbox.get()[2]) is not None:
                work.resolve(EngineFailed(reason))

    def _end(self) -> None:
        self._packing.shutdown(wait=False)
        self._collecting.shutdown(wait=False)

    def _execute(self, loaded: Loaded, work: Work) -> None:
        model = loaded.models[work.model]
        self._launched.acquire()
        started = perf_counter()
        try:
            launched = launch(model, work.rows, loaded.device, use_flash_attn=loaded.use_flash_attn, packed=work.packed)
        except Exception as error:
            self._launched.release()
            logger.warning("a batch failed on the device: %s: %s", type(error).__name__, error)
            self._probe(loaded)
            work.resolve(error)
            return
        if loaded.device.type == "cuda":
            self._collecting.submit(self._answer, work, launched, started)
        else:
            self._answer(work, launched, started)

    def _answer(self, work: Work, launched: Launched, started: float) -> None:
        """Wait for a batch that was launched at `started` and answer it."""
        try:
            rows = collect(launched)
        except Exception as error:  # CUDA reports what goes wrong in a kernel here
            logger.warning("a batch failed on the device: %s: %s", type(error).__name__, error)
            self._inbox.put((PROBE, next(self._numbers), None))
            work.resolve(error)
        else:
            done = perf_counter()
            # The device began with this batch when it was done with the one before.
            seconds = done - max(started, self._last_done)
            self._last_done = done
            fitting = launched.fitting_tokens if launched.splits else None
            work.resolve(BatchResult(rows, seconds, launched.splits, fitting))
        finally:
            self._launched.release()

    def _probe(self, loaded: Loaded) -> None:
        """After a failure: a device that cannot run one token any more ends the thread by raising."""
        for model in loaded.models.values():
            row = Row(np.zeros(1, dtype=np.int32))
            collect(launch(model, [row], loaded.device, use_flash_attn=loaded.use_flash_attn))
