"""Threads for what must not hold up the event loop: tokenizing, parsing, encoding, packing, the disk."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from traceback import clear_frames
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar
from weakref import WeakSet

from vecmill.core.errors import ShuttingDown, WorkLost

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Characters or bytes of work that a person may be waiting for; more takes its turn among the large.
SMALL = 16_384


class _Call(Generic[T]):
    """One piece of work, and what comes of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.result: Future[T] = Future()

    def __call__(self) -> None:
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            value = self._function()
        except Exception as error:
            self.result.set_exception(error)
        except BaseException as error:  # also a panic of a library in Rust, which no handler of Exception would see
            panic = RuntimeError(f"{type(error).__name__} in a worker thread")
            panic.__cause__ = error
            self.result.set_exception(panic)
        else:
            self.result.set_result(value)

    def __del__(self) -> None:
        """Its thread ended between taking it and running it, or in the midst of answering: nobody else has it."""
        if not self.result.done():
            with suppress(Exception):
                self.result.set_exception(WorkLost())


class LastingThreads(Executor):
    """At most `count` threads, started as there is work. One that ends for any reason is replaced.

    In the standard library's executors a thread that memory or an asynchronous exception has ended is missing for good,
    and whoever waits for the work that it had taken waits for ever.
    """

    def __init__(self, count: int, name: str, ended: Callable[[], None] = lambda: None) -> None:
        """`name`: what the threads' names begin with. `ended` is called in each that ends."""
        self._count = count
        self._name = name
        self._ended = ended
        self._queue: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._lock = threading.RLock()
        self._threads: set[threading.Thread] = set()
        self._unfinished = 0
        self._closed = False
        _ALL.add(self)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call the function in a thread, in the order of submission.

        Raises:
            RuntimeError: it is shut down. WorkLost: the system gives no thread.
        """
        call = _Call(partial(function, *args, **kwargs))
        self.give(call)
        return call.result

    def give(self, call: _Call[Any]) -> None:
        """As `submit`, what is a call already."""
        with self._lock:
            if self._closed:
                raise RuntimeError("these threads are shut down")
            self._unfinished += 1
            try:
                self._queue.put(call)
                self._hire()
            except BaseException:  # also where this thread is ended here: the call must not stay in the queue
                self._unfinished -= 1
                for other in [self._queue.get_nowait() for _ in range(self._queue.qsize())]:
                    if other is not call:
                        self._queue.put(other)
                raise
            call.result.add_done_callback(self._finished)

    def _finished(self, _: Future[Any]) -> None:
        with self._lock:
            self._unfinished -= 1

    def _hire(self) -> None:
        """Start a thread if all have something to do. Under the lock."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) >= min(self._count, self._unfinished):
            return
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise WorkLost from error
        else:
            self._threads.add(thread)

    def _work(self) -> None:
        call: _Call[Any] | None = None
        try:
            while (call := self._queue.get()) is not None:
                call()
                call = None  # and what it holds, before the next comes
        except BaseException as error:
            logger.critical("a worker thread ended and is replaced", exc_info=error)
            # The log may keep the traceback. Its frames must not keep the call, which fails once nothing refers to it.
            clear_frames(error.__traceback__)
        finally:
            call = None
            with self._lock:
                self._threads.discard(threading.current_thread())
                if not self._closed and not self._queue.empty():
                    with suppress(WorkLost):  # the next submission tries again
                        self._hire()
            self._ended()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; the threads end after what they were given, or with `cancel_futures` after what runs."""
        with self._lock:
            self._closed = True
            threads = set(self._threads)
        if cancel_futures:
            with suppress(Empty):
                while True:
                    call = self._queue.get_nowait()
                    if call is not None:
                        call.result.cancel()
        for _ in threads:
            self._queue.put(None)
        if wait:
            for thread in threads - {threading.current_thread()}:
                thread.join()


_ALL: WeakSet[LastingThreads] = WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that runs a library's code while Python is taken down would crash the process."""
    for threads in list(_ALL):
        threads.shutdown()


class SharedThreads:
    """`count` threads for calls that compute, some with several threads of a library's own: no more than `count` run.

    A call begins once as many threads as it computes with are free: urgent calls first, each kind in order. No call
    overtakes one that waits for threads. An urgent call also begins where a call that is not urgent calls `give_way`,
    and runs in that call's threads.
    """

    def __init__(self, count: int, name: str) -> None:
        """`name`: what the threads' names begin with."""
        self._count = count
        # A thread starts what waits once its call is done. Where it ends instead, `_begin` is called all the same.
        self._threads = [LastingThreads(1, name, self._begin) for _ in range(count)]
        self._urgent: deque[tuple[int, _Call[Any]]] = deque()
        self._other: deque[tuple[int, _Call[Any]]] = deque()
        self._running: dict[int, tuple[int, Future[Any]]] = {}
        """By the index of the thread that runs it: the width of the call, and its result. Which threads are free is
        derived from these results alone, so a thread that ends cannot leave a wrong count behind.
        """
        self._lock = threading.Lock()
        self._beginning = threading.local()
        self._closed = False

    def submit(self, function: Callable[[], T], width: int, *, urgent: bool = False) -> Future[T]:
        """Call the function in a thread. `width`: threads that it computes with, of these at most all.

        Where the system gives no thread it is called here and now, or in a thread that another call has had.

        Raises:
            RuntimeError: they are shut down.
        """
        width = min(width, self._count)
        call = _Call(function if urgent else partial(self._giving_way, width, function))
        result = call.result
        result.add_done_callback(self._begin)
        with self._lock:
            if self._closed:
                raise RuntimeError("these threads are shut down")
            (self._urgent if urgent else self._other).append((width, call))
        del call  # where its thread ends, the call fails once nothing refers to it
        self._begin()
        return result

    def _giving_way(self, width: int, function: Callable[[], T]) -> T:
        _current.threads, _current.width = self, width
        try:
            return function()
        finally:
            _current.threads = None

    def give_way(self, width: int) -> None:
        """Run one waiting urgent call that computes with at most `width` threads. For the function `give_way`."""
        if not self._urgent:
            return
        with self._lock:
            if not self._urgent or self._urgent[0][0] > width:
                return
            _, call = self._urgent.popleft()
        call()

    def _begin(self, _: object = None) -> None:
        """Start what may begin now. Not under the lock: a call may run in here."""
        if getattr(self._beginning, "here", False):
            return  # a call that was made in the loop below has ended: the loop goes on
        try:
            self._beginning.here = True
            while (taken := self._next()) is not None:
                thread, call = taken
                try:
                    thread.give(call)
                except WorkLost:
                    call()
                except RuntimeError:
                    pass  # the process ends; whoever waits for the call is told
                del taken, call
        finally:
            self._beginning.here = False
        if self._closed:
            self.shutdown()

    def _next(self) -> tuple[LastingThreads, _Call[Any]] | None:
        with self._lock:
            self._running = {index: each for index, each in self._running.items() if not each[1].done()}
            free = self._count - sum(width for width, _ in self._running.values())
            waiting = self._urgent or self._other
            if not waiting or waiting[0][0] > free:
                return None
            width = waiting[0][0]
            # OpenMP keeps a team of threads for each thread that ever used one. To bound their number, only the first
            # thread runs calls of all threads, only the first two those of half of them, the first three of a third ...
            idle = [index for index in range(self._count // width) if index not in self._running]
            if not idle:
                return None
            _, call = waiting.popleft()
            self._running[idle[-1]] = width, call.result
            return self._threads[idle[-1]], call

    def shutdown(self) -> None:
        """Take no more calls; the threads end after those that they have been given. Does not wait."""
        with self._lock:
            self._closed = True
            if self._urgent or self._other or any(not result.done() for _, result in self._running.values()):
                return  # the last that ends does it
        for thread in self._threads:
            thread.shutdown(wait=False)


class _CurrentCall(threading.local):
    """What the calling thread runs."""

    threads: SharedThreads | None = None
    """Those whose call it runs; None: it runs none, or an urgent one, which does not give way."""
    width = 0
    """Threads that it computes with."""


_current = _CurrentCall()


def give_way() -> None:
    """Called from within a call of `SharedThreads`: run one waiting urgent call, if there is one, and return.

    Only one each time, and an urgent call never gives way, so the calling one ends however many urgent calls come.
    """
    if (threads := _current.threads) is None:
        return
    _current.threads = None
    try:
        threads.give_way(_current.width)
    finally:
        _current.threads = threads


class WorkerThreads:
    """`workers` threads for large pieces of work, and one more for small ones, which never wait behind the large."""

    def __init__(self, workers: int) -> None:
        self._large = LastingThreads(workers, "worker")
        self._small = LastingThreads(1, "small-worker")

    async def run(self, function: Callable[[], T], *, size: int) -> T:
        """Call the function in a thread. `size` is in characters or bytes.

        Raises:
            ShuttingDown: there are no threads any more. WorkLost: the thread ended.
        """
        threads = self._small if size <= SMALL else self._large
        try:
            running = threads.submit(function)
        except RuntimeError:
            raise ShuttingDown from None
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ShuttingDown from None  # the threads ended before it was its turn

    async def run_if_large(self, function: Callable[[], T], *, size: int) -> T:
        """As `run`, but what is small is called at once: for work that costs less than the way to a thread."""
        return function() if size <= SMALL else await self.run(function, size=size)

    def shutdown(self) -> None:
        """Let running calls end, cancel the others, do not wait."""
        for threads in (self._large, self._small):
            threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """Call a function; None where it takes longer than `seconds`, and goes on in its thread.

    Raises:
        Exception: what the function raised.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # raised again in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None
