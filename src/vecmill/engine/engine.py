"""The thread that owns the device. Others hand it batches; every batch is answered, also when the thread dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.errors import EngineFailed, NonFiniteEmbedding
from vecmill.core.protocols import BatchResult
from vecmill.core.types import Row, Vector
from vecmill.engine.device import device_memory
from vecmill.engine.loader import Loaded, LoadedModel, Report, load
from vecmill.hardware.memory import DeviceMemory
from vecmill.models.packing import pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """One batch, and who waits for it."""

    model: str
    rows: Sequence[Row]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[BatchResult]

    def resolve(self, result: BatchResult | Exception) -> None:
        """Answer from the device's thread; the event loop may be gone by now."""
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
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._busy = False
        self._thread = threading.Thread(target=self._own_device, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batch it is running."""
        self._inbox.put(None)

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device now."""
        return self._busy

    def memory(self) -> DeviceMemory | None:
        """The device's own memory; None before it is loaded and on a CPU."""
        if not self.loaded.done() or self.loaded.exception() is not None:
            return None
        return device_memory(self.loaded.result().device)

    async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
        """Run one forward pass.

        Raises:
            EngineFailed: the device's thread has ended.
            Exception: what the forward pass raised; the engine goes on.
        """
        loop = asyncio.get_running_loop()
        work = Work(model, rows, loop, loop.create_future())
        with self._lock:
            if self._failure is not None:
                raise EngineFailed(self._failure)
            self._inbox.put(work)
        return await work.answer

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
            while (work := self._inbox.get()) is not None:
                self._execute(loaded, work)
            self._die("503: the server is shutting down.")
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
        while not self._inbox.empty():
            if (work := self._inbox.get()) is not None:
                work.resolve(EngineFailed(reason))

    def _execute(self, loaded: Loaded, work: Work) -> None:
        self._busy = True
        started = perf_counter()
        try:
            rows = self._forward(loaded.models[work.model], work.rows, loaded.device)
        except Exception as error:
            logger.warning("a batch failed on the device: %s: %s", type(error).__name__, error)
            self._probe(loaded)
            work.resolve(error)
        else:
            work.resolve(BatchResult(rows, perf_counter() - started))
        finally:
            self._busy = False

    def _probe(self, loaded: Loaded) -> None:
        """After a failure: a device that cannot run one token any more ends the thread by raising."""
        for model in loaded.models.values():
            self._forward(model, [Row(np.zeros(1, dtype=np.int32))], loaded.device)

    @torch.inference_mode()
    def _forward(self, model: LoadedModel, rows: Sequence[Row], device: torch.device) -> list[Vector | Exception]:
        """Vectors or logits in the order of `rows`, not normalised; an error in place of a row that is not finite."""
        packed = pack(rows, device, model.prefixes)
        answers = model.model.forward(packed, use_flash_attn=self._settings.use_flash_attn)
        vectors = answers.cpu().numpy()  # (N, width) float32
        for new in packed.new_prefixes:  # after the pass has succeeded, so that what is kept is whole
            model.prefixes.keep(new.prefix, new.layers)
        finite = np.isfinite(vectors).all(axis=1)
        results: list[Vector | Exception] = [NonFiniteEmbedding()] * len(rows)
        for index, vector, good in zip(packed.order, vectors, finite, strict=True):
            if good:
                results[index] = vector
        return results
