"""The thread that owns the device. Others hand it batches; every batch is answered, also when the thread dies.

Between batches it takes models in and out. One that is being loaded is read by a thread of its own; its warm-up lets
the other models' batches go first before each of its passes.

While one batch runs, the next is packed and copied by another thread. A batch is launched while the one before it still
runs: on CUDA on the stream of its lane, and a thread for each lane waits for the answers; on a CPU in the threads for
passes, of which the last to end answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.errors import EngineFailed, WorkLost
from vecmill.core.protocols import BatchResult
from vecmill.core.threads import LastingThreads
from vecmill.core.types import Lane, Row, Task
from vecmill.engine.device import device_memory, gpu_uuid, limit_memory
from vecmill.engine.forward import Launched, LoadedModel, Packed, collect, have_prefix, launch, pack_on, runs_by_itself
from vecmill.engine.live_models import READING_SHARE, LiveModels
from vecmill.engine.loader import Known, Loaded, Report, load
from vecmill.engine.measurements import Measurements
from vecmill.engine.warmup import Interrupted
from vecmill.hardware.memory import DeviceMemory, give_back_memory

logger = logging.getLogger(__name__)

LAUNCHED_AT_A_TIME = 2
"""Of one lane: one runs, one is queued behind it. More would gain nothing and only be harder to overtake."""


def may_launch(lane: Lane, launched: Mapping[Lane, int]) -> bool:
    """Whether a batch may go to the device while so many of each lane are there.

    Bulk that has been launched does not hold interactive work up: that has a stream of higher priority, whose kernels
    go first, and on a CPU its passes do. So each lane is only kept from crowding itself.
    """
    return launched[lane] < LAUNCHED_AT_A_TIME


T = TypeVar("T")
PROBES = 10  # of a device, at most, where the threads end that run them
OTHERS_AT_ONCE = 4  # batches that go before one pass of a warm-up, at most: else it would never end under load


class Call(Generic[T]):
    """Something that the device's thread is to do between batches, and what comes of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.result: Future[T] = Future()

    def run(self) -> bool:
        """Do it; whether that went well. What is no Exception is raised."""
        try:
            self.result.set_result(self._function())
        except Interrupted as interrupted:
            self.result.set_exception(interrupted)
        except Exception as error:
            self.result.set_exception(error)
            return False
        except BaseException as error:
            self.result.set_exception(EngineFailed())
            raise error
        return True

    def fail(self, error: Exception) -> None:
        """Have whoever waits for the result know that it will not come."""
        if not self.result.done():
            self.result.set_exception(error)


@dataclass(frozen=True, slots=True)
class Probe:
    """The device is to be probed."""

    then: Callable[[], None]


class Inbox:
    """What the device's thread does next: probes, then calls, then interactive batches, then bulk.

    Safe to use from any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Lane, deque[QueuedBatch]] = {lane: deque() for lane in Lane}
        self._launched: Counter[Lane] = Counter()
        self._calls: deque[Call[Any]] = deque()
        self._probes: deque[Probe] = deque()
        self._closed = False

    def put(self, lane: Lane, work: QueuedBatch) -> None:
        """Queue a batch."""
        with self._changed:
            self._waiting[lane].append(work)
            self._changed.notify()

    def probe(self, then: Callable[[], None]) -> None:
        """Have the device probed before anything else is run, and `then` called unless it has failed."""
        with self._changed:
            self._probes.append(Probe(then))
            self._changed.notify()

    def call(self, call: Call[Any]) -> None:
        """Have something done between two batches."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify()

    def close(self) -> None:
        """End after the batches that are queued."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def ended(self, lane: Lane) -> None:
        """A batch that was taken is off the device."""
        with self._changed:
            self._launched[lane] -= 1
            self._changed.notify()

    def take(self) -> tuple[Lane, QueuedBatch] | Call[Any] | Probe:
        """Wait for a batch that may be launched, for a call, or for a probe.

        Raises:
            Closed: it was closed, and all is done.
        """
        with self._changed:
            while True:
                if self._probes:
                    return self._probes.popleft()
                if self._calls:
                    if not self._on_device:
                        return self._calls.popleft()
                    self._changed.wait()
                    continue
                if (batch := self._next_batch()) is not None:
                    return batch
                if self._closed and not self._on_device and not any(self._waiting.values()):
                    raise Closed
                self._changed.wait()

    def take_now(self) -> tuple[Lane, QueuedBatch] | Probe | None:
        """A batch that may be launched now, or a probe, if there is one."""
        with self._changed:
            return self._probes.popleft() if self._probes else self._next_batch()

    def wait_until_idle(self) -> None:
        """Until every batch that was taken is off the device."""
        with self._changed:
            while self._on_device:
                self._changed.wait()

    @property
    def _on_device(self) -> bool:
        return self._launched.total() > 0

    def _next_batch(self) -> tuple[Lane, QueuedBatch] | None:
        for lane in (Lane.INTERACTIVE, Lane.BULK):
            if self._waiting[lane] and may_launch(lane, self._launched):
                if lane is Lane.BULK and self._waiting[lane][0].by_itself and self._on_device:
                    return None  # the device's thread would wait for it, and could launch no search meanwhile
                self._launched[lane] += 1
                return lane, self._waiting[lane].popleft()
        return None

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for the device."""
        with self._changed:
            return self._closed or bool(self._probes or self._calls or any(self._waiting.values()))

    def clear_calls(self) -> list[Call[Any]]:
        """Take out the calls that wait."""
        with self._changed:
            left = list(self._calls)
            self._calls.clear()
            return left

    def clear(self) -> None:
        """Take out all batches that wait."""
        with self._changed:
            for waiting in self._waiting.values():
                waiting.clear()


class Closed(Exception):
    """There is nothing left to take."""


@dataclass(slots=True, eq=False)
class QueuedBatch:
    """One batch, and who waits for it."""

    model: str
    rows: Sequence[Row]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[BatchResult]
    packed: Sequence[Packed] | None = None
    by_itself: bool = False
    """Whether the device's thread waits for its answers before it launches another."""

    def resolve(self, result: BatchResult | Exception) -> None:
        """Answer from another thread; the event loop may be gone by now."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._set, result)

    fail = resolve

    def _set(self, result: BatchResult | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class Engine:
    """A `ForwardRunner` on a device. `loaded` resolves once the models are warm, or with what went wrong."""

    def __init__(
        self,
        models: ModelSettings,
        engine: EngineSettings,
        report: Report,
        measurements: Path | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """`measurements`: the file that keeps what warm-up finds out, for the next start; None: it is not kept.
        `at_once`: `loaded` resolves as soon as the first model can be run; `load` is to be called for the others, which
        it names, and `measure_again`.
        """
        self.loaded: Future[Loaded] = Future()
        self._measurements = measurements
        self._at_once = at_once
        self._model_settings = models
        self._settings = engine
        self._report = report
        self._inbox = Inbox()
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._live: LiveModels | None = None
        self._loading: threading.Thread | None = None
        self._progress = PendingPasses()
        # Here and not in the device's thread: a new thread has as many as any thread of the process has set last, and
        # passes of an engine before this one had fewer.
        self._threads = torch.get_num_threads()
        self._last_done, self._last_lane = 0.0, Lane.BULK
        self._unanswered: set[QueuedBatch | Call[Any]] = set()
        """All that somebody waits for, wherever it is: a thread that ends may take along what it had just taken."""
        self._packing = LastingThreads(1, "pack")
        self._collecting = {lane: LastingThreads(1, f"collect-{lane}") for lane in Lane}
        self._thread = threading.Thread(target=self._own_device, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the batches that it has been given."""
        self._after_packing(self._close, self._close)

    def _close(self) -> None:
        with self._lock:
            self._failure = self._failure or "503: the server is shutting down."
            self._inbox.close()

    @property
    def busy(self) -> bool:
        """Whether a batch is on the device now."""
        return len(self._progress) > 0

    @property
    def hung(self) -> str | None:
        """A sentence if the device has answered nothing for far too long; None otherwise."""
        return self._progress.hung(FEWEST_SECONDS_LOADING if self._loading is not None else FEWEST_SECONDS)

    @property
    def alive(self) -> bool:
        """True while the engine thread runs, or one that loads a model."""
        return self._thread.is_alive() or self._loading is not None

    def add_cached(self, folder: Path, model_id: str, task: Task | None) -> Known:
        """List a model of the hub's cache, by its folder there. It reads files: not for the event loop.

        Raises:
            StartupError: its files are not those of a model that is read here.
        """
        assert self._live is not None  # once `loaded` has resolved
        return self._live.add_cached(folder, model_id, task)

    def keep_measured(self) -> None:
        """Keep for the next start what is known by now of the models. It writes a file: not for the event loop."""
        if self._live is not None:
            self._live.keep_measured()

    def shortage(self, weight_bytes: int) -> str | None:
        """Why so many bytes of weights do not fit into the GPU's memory now; None on a CPU. Asks the driver."""
        room = limit_memory(self.loaded.result().device, self._settings.memory_fraction, self._settings.memory_floor_gb)
        return None if room is None else room.shortage(weight_bytes)

    def load(self, key: str, report: Report) -> Future[LoadedModel]:
        """Read a listed model and warm it up while others are served; returns at once.

        One call of `load` or `unload` must have ended before the next. The future has what went wrong: a StartupError,
        or EngineFailed; the engine goes on without the model.
        """
        return self._in_loading_thread(partial(self._load, key, report))

    def unload(self, key: str, *, sleep: bool = False) -> Future[None]:
        """Take a model out and give its memory back; it must not be in use. Returns at once.

        With `sleep` it waits in the machine's memory, where SLEEP_GB has room for it; else its sleep ends, too.
        """
        return self._in_loading_thread(partial(self._unload, key, sleep=sleep))

    @property
    def asleep(self) -> Mapping[str, int]:
        """Bytes of the machine's memory that models sleep in, by key."""
        return {} if self._live is None else self._live.asleep

    def measure_again(self, key: str) -> bool:
        """Measure a model anew, now that nobody waits for the device: what its passes take, and which type of weights
        is the fastest. What was found is in `Loaded.warmed`. False: somebody waits by now, and nothing has changed.

        Waits until it is done: not for the event loop. No call of `load` or `unload` may run meanwhile.

        Raises:
            EngineFailed: the thread has ended.
        """
        live = self._live
        assert live is not None  # once `loaded` has resolved
        try:
            self._on_device(partial(live.measure_again, key, self._check_quiet))
        except Interrupted:
            return False
        return True

    def _check_quiet(self) -> None:
        if self._failure is not None or self._inbox.is_wanted:
            raise Interrupted

    def _in_loading_thread(self, function: Callable[[], T]) -> Future[T]:
        """A daemon: reading weights must not hold up the end of the process."""
        result: Future[T] = Future()

        def work() -> None:
            try:
                done = function()
            except BaseException as error:
                self._loading = None
                result.set_exception(error)
            else:
                self._loading = None
                result.set_result(done)

        self._loading = threading.Thread(target=work, name="loading", daemon=True)
        self._loading.start()
        return result

    def _load(self, key: str, report: Report) -> LoadedModel:
        live = self._live
        assert live is not None

        def tell(percent: float, message: str) -> None:
            if self._failure is not None:
                raise EngineFailed(self._failure)
            report(percent, message)

        try:
            model = live.read(key, tell)
        except BaseException:
            give_back_memory()
            raise
        give_back_memory()  # where it slept
        tell(100 * READING_SHARE, f"warming up {model.card.id}")
        try:
            self._on_device(partial(live.attach, model, self._serve_others))
        except BaseException:
            with contextlib.suppress(EngineFailed):
                self._on_device(partial(live.release, model))
            del model
            give_back_memory()
            raise
        return model

    def _unload(self, key: str, *, sleep: bool) -> None:
        live = self._live
        assert live is not None
        if not sleep:
            live.forget(key)
        if (model := self.loaded.result().models.get(key)) is not None:
            copies = live.copied(model) if sleep else None
            self._on_device(partial(live.release, model, copies))
            del model, copies
        give_back_memory()

    def _on_device(self, function: Callable[[], T]) -> T:
        """Call in the device's thread, between batches, and wait for it.

        Raises:
            EngineFailed: the thread has ended. Exception: what the function raised.
        """
        call = Call(function)
        with self._waiting_for(call):
            with self._lock:
                if self._failure is not None:
                    raise EngineFailed(self._failure)
                self._inbox.call(call)
            return call.result.result()

    @contextmanager
    def _waiting_for(self, work: QueuedBatch | Call[Any]) -> Iterator[None]:
        """Should the device's thread end meanwhile, `work` fails."""
        self._unanswered.add(work)
        try:
            yield
        finally:
            self._unanswered.discard(work)

    def _serve_others(self) -> None:
        """Run batches that wait, in the midst of a warm-up, which ends where the engine does."""
        loaded = self.loaded.result()
        for _ in range(OTHERS_AT_ONCE):
            if self._failure is not None:
                raise EngineFailed(self._failure)
            if (taken := self._inbox.take_now()) is None:
                break
            self._do(loaded, taken)
        self._inbox.wait_until_idle()

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

        To be called once `loaded` has resolved: earlier it would block the event loop until then.

        Raises:
            EngineFailed: the device's thread has ended.
            Exception: what the forward pass raised; the engine goes on.
        """
        loop = asyncio.get_running_loop()
        work = QueuedBatch(model, rows, loop, loop.create_future())
        # A shared prefix may be computed by the very batch that runs now: what has one is packed when its turn comes.
        with self._waiting_for(work):
            if self.busy and not have_prefix(rows):
                self._after_packing(partial(self._pack_and_queue, work, lane), partial(self._queue, work, lane))
            else:
                self._queue(work, lane)
            with self._progress.of(self._expected_seconds(model, rows)):
                return await work.answer

    def _expected_seconds(self, model: str, rows: Sequence[Row]) -> float:
        return self.loaded.result().warmed[model].calibration.seconds(sum(map(len, rows)))

    def _after_packing(self, function: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Call in the packing thread, in order. `otherwise` is called where that has ended, or ends over it."""
        try:
            packing = self._packing.submit(function)
        except (RuntimeError, WorkLost):
            otherwise()
        else:
            packing.add_done_callback(lambda done: None if done.exception() is None else otherwise())

    def _pack_and_queue(self, work: QueuedBatch, lane: Lane) -> None:
        # What goes wrong here goes wrong again on the device's thread, which answers for it.
        with contextlib.suppress(Exception):
            loaded = self.loaded.result()
            work.packed = pack_on(loaded.runs_on, loaded.models[work.model], work.rows)
        self._queue(work, lane)

    def _queue(self, work: QueuedBatch, lane: Lane) -> None:
        work.by_itself = runs_by_itself(self.loaded.result().runs_on, work.rows)
        with self._lock:
            if self._failure is None:
                self._inbox.put(lane, work)
            else:
                work.resolve(EngineFailed(self._failure))

    def _own_device(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            kept = None if self._measurements is None else Measurements(self._measurements)
            loaded = load(self._model_settings, self._settings, self._report, kept, at_once=self._at_once)
        except BaseException as error:
            self._die("503: the model could not be loaded.")
            self.loaded.set_exception(error)
            return
        self._live = LiveModels(loaded, self._model_settings, self._settings)
        self.loaded.set_result(loaded)
        try:
            while True:
                self._do(loaded, self._inbox.take())
        except Closed:
            self._end()
        except BaseException as error:
            logger.critical("the device's thread ended", exc_info=error)
            self._die(f"503: the device has failed ({type(error).__name__}) and the server must be restarted.")

    def _do(self, loaded: Loaded, taken: tuple[Lane, QueuedBatch] | Call[Any] | Probe) -> None:
        if isinstance(taken, tuple):
            self._run(loaded, *taken)
        elif isinstance(taken, Probe):
            self._probe(loaded)
            taken.then()
        elif not taken.run():
            self._probe(loaded)

    def _run(self, loaded: Loaded, lane: Lane, work: QueuedBatch) -> None:
        started = perf_counter()
        try:
            launched = launch(loaded.models[work.model], work.rows, loaded.runs_on, lane, work.packed)
        except Exception as error:
            self._inbox.ended(lane)
            logger.warning("a batch failed on the device: %s: %s", type(error).__name__, error)
            self._probe(loaded)
            work.resolve(error)
            return
        if work.by_itself:
            self._answer_here(lane, work, launched, started)
        elif launched.running:
            launched.then(partial(self._passes_ended, lane, work, launched, started))
        else:
            self._answer_elsewhere(lane, work, launched, started)

    def _passes_ended(self, lane: Lane, work: QueuedBatch, launched: Launched, started: float) -> None:
        """Answer in the thread of the last pass: waking another would take time.

        Not where a thread has ended over its pass: then this is called when the last reference to the pass goes, which
        may be in a block that holds the lock.
        """
        if launched.is_lost:
            self._answer_elsewhere(lane, work, launched, started)
        else:
            self._answer_here(lane, work, launched, started)

    def _answer_here(self, lane: Lane, work: QueuedBatch, launched: Launched, started: float) -> None:
        try:
            self._answer(lane, work, launched, started)
        except BaseException:
            work.resolve(WorkLost())
            raise
        finally:
            self._inbox.ended(lane)

    def _answer_elsewhere(self, lane: Lane, work: QueuedBatch, launched: Launched, started: float) -> None:
        try:
            collecting = self._collecting[lane].submit(self._answer, lane, work, launched, started)
        except (WorkLost, RuntimeError):  # the system gives no thread, or the engine has ended
            self._answer_here(lane, work, launched, started)
        else:
            collecting.add_done_callback(partial(self._collected, lane, work))

    def _collected(self, lane: Lane, work: QueuedBatch, collecting: Future[None]) -> None:
        """Also where the collecting thread ended over it."""
        if isinstance(error := collecting.exception(), Exception):
            work.resolve(error)
        self._inbox.ended(lane)

    def _die(self, reason: str) -> None:
        """Refuse new work and answer all that anybody waits for."""
        with self._lock:
            self._failure = reason
        self._end()
        self._inbox.clear()
        for work in list(self._unanswered):
            work.fail(EngineFailed(reason))

    def _end(self) -> None:
        for call in self._inbox.clear_calls():
            call.fail(EngineFailed(self._failure))
        if self._live is not None:
            self.loaded.result().runs_on.close()
        self._packing.shutdown(wait=False)
        for collecting in self._collecting.values():
            collecting.shutdown(wait=False)

    def _answer(self, lane: Lane, work: QueuedBatch, launched: Launched, started: float) -> None:
        """Wait for a batch that was launched at `started` and answer it."""
        try:
            rows = collect(launched)
        except Exception as error:  # CUDA reports what goes wrong in a kernel here
            logger.warning("a batch failed on the device: %s: %s", type(error).__name__, error)
            self._inbox.probe(partial(work.resolve, error))  # not answered so where the device turns out to have failed
        else:
            with self._lock:
                done = perf_counter()
                # The device began with this batch when it was done with the one before.
                seconds = done - max(started, self._last_done)
                overlapped = self._last_lane is not lane and started < self._last_done
                self._last_done, self._last_lane = done, lane
            fitting = launched.fitting_tokens if launched.splits else None
            work.resolve(BatchResult(rows, seconds, launched.splits, fitting, overlapped))

    def _probe(self, loaded: Loaded) -> None:
        """After a failure: a device that cannot run one token any more ends the thread by raising."""
        for model in loaded.models.values():
            for _ in range(PROBES):
                # A thread that ended over it says nothing of the device.
                with contextlib.suppress(WorkLost):
                    collect(launch(model, [Row(np.zeros(1, dtype=np.int32))], loaded.runs_on, Lane.INTERACTIVE))
                    break


# A forward pass is taken for hung after this many times what warm-up says that it takes, and no earlier than after a
# minute: an unforeseen shape may be compiled first.
TIMES_EXPECTED = 20
FEWEST_SECONDS = 60.0
FEWEST_SECONDS_LOADING = 600.0  # while a model is loaded: its layers may be compiled


class PendingPasses:
    """Forward passes that are not answered yet. Belongs to the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._expected: list[float] = []
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._expected)

    @contextmanager
    def of(self, expected_seconds: float) -> Iterator[None]:
        """One forward pass, from when it is handed over until it is answered."""
        if not self._expected:
            self._since = self._clock()
        self._expected.append(expected_seconds)
        try:
            yield
        finally:
            self._expected.remove(expected_seconds)
            self._since = self._clock()

    def hung(self, fewest_seconds: float = FEWEST_SECONDS) -> str | None:
        """A sentence if nothing was answered for far too long; None while there is progress, or nothing to do."""
        if not self._expected:
            return None
        longest, seconds = max(self._expected), self._clock() - self._since
        if seconds <= max(fewest_seconds, TIMES_EXPECTED * longest):
            return None
        return f"the device has answered nothing for {seconds:.0f} s; the longest forward pass takes {longest:.3g} s"
