"""Worker threads: whoever waits for one is answered, also when they end."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecmill.core.errors import ShuttingDown, WorkLost
from vecmill.core.threads import SMALL, SharedThreads, WorkerThreads, give_way


async def test_what_had_no_turn_when_the_threads_end_is_told_so() -> None:
    gate = threading.Event()
    threads = WorkerThreads(1)
    first = asyncio.create_task(threads.run(gate.wait, size=SMALL + 1))
    second = asyncio.create_task(threads.run(lambda: 1, size=SMALL + 1))
    await asyncio.sleep(0)
    threads.shutdown()
    gate.set()
    assert await first
    with pytest.raises(ShuttingDown):
        await second
    with pytest.raises(ShuttingDown):
        await threads.run(lambda: 1, size=1)


async def test_who_is_cancelled_is_not_told_anything_else() -> None:
    gate = threading.Event()
    with WorkerThreads(1) as threads:
        waiting = asyncio.create_task(threads.run(gate.wait, size=1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.set()


async def test_a_thread_that_ends_is_replaced_and_who_waits_is_told() -> None:
    with WorkerThreads(1) as threads:
        thread = await threads.run(threading.current_thread, size=1)
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        async with asyncio.timeout(10):
            with suppress(WorkLost):  # it may end before it has taken this
                await threads.run(lambda: None, size=1)
            # Its identifier may be the same: the system gives it again.
            assert await threads.run(threading.current_thread, size=1) is not thread


class Held:
    """Calls for threads that are shared, which last until they are let go."""

    def __init__(self, threads: SharedThreads) -> None:
        self._threads = threads
        self._changed = threading.Condition()
        self._ending: set[str] = set()
        self.begun: list[str] = []

    def submit(self, name: str, width: int = 1, *, urgent: bool = False) -> Future[str]:
        def run() -> str:
            with self._changed:
                self.begun.append(name)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: name in self._ending, timeout=20)
            return name

        return self._threads.submit(run, width, urgent=urgent)

    def end(self, *names: str) -> None:
        with self._changed:
            self._ending.update(names)
            self._changed.notify_all()

    def have_begun(self, *names: str) -> None:
        """These and no others."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= len(names), timeout=20), self.begun
        time.sleep(0.02)  # no more than these
        assert sorted(self.begun) == sorted(names)


def test_urgent_calls_get_the_next_thread_and_each_begins_as_one_is_free() -> None:
    threads = SharedThreads(2, "shared")
    held = Held(threads)
    calls = [held.submit(name) for name in ("a", "b", "c", "d")]
    held.have_begun("a", "b")
    calls.append(held.submit("search", urgent=True))
    held.end("b")  # and not `a`, which was given before
    held.have_begun("a", "b", "search")
    held.end("search")
    held.have_begun("a", "b", "search", "c")
    held.end("a", "c", "d")
    assert [call.result(20) for call in calls] == ["a", "b", "c", "d", "search"]
    threads.shutdown()


def test_a_call_of_several_threads_waits_for_them_and_is_not_overtaken() -> None:
    threads = SharedThreads(4, "shared")
    held = Held(threads)
    calls = [held.submit("a"), held.submit("b", 2), held.submit("all", 4), held.submit("c")]
    held.have_begun("a", "b")  # one thread is free, and `c` may not have it
    held.end("a")
    held.have_begun("a", "b")
    held.end("b")
    held.have_begun("a", "b", "all")
    held.end("all")
    held.have_begun("a", "b", "all", "c")
    held.end("c")
    assert [call.result(20) for call in calls] == ["a", "b", "all", "c"]
    threads.shutdown()


@given(st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=50)
def test_never_more_threads_than_there_are_and_wide_calls_in_the_first_ones(count: int, data: st.DataObject) -> None:
    """A library keeps as many threads for each of ours as that ever computed with."""
    widths = data.draw(st.lists(st.sampled_from([count // each for each in range(1, count + 1)]), max_size=40))
    threads, lock = SharedThreads(count, "shared"), threading.Lock()
    taken, most, wide = 0, 0, dict[int, int]()

    def run(width: int) -> None:
        nonlocal taken, most
        with lock:
            taken += width
            most = max(most, taken)
            own = threading.get_ident()
            wide[own] = max(wide.get(own, 0), width)
        time.sleep(0)
        with lock:
            taken -= width

    calls = [threads.submit(partial(run, width), width, urgent=width == 1) for width in widths]
    for call in calls:
        call.result(20)
    threads.shutdown()
    assert most <= count
    assert all(width * (place + 1) <= count for place, width in enumerate(sorted(wide.values(), reverse=True)))


def test_a_shared_thread_that_ends_fails_its_call_and_its_place_is_free_again() -> None:
    threads = SharedThreads(1, "shared")
    thread = threads.submit(threading.current_thread, 1).result(20)
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    with suppress(WorkLost):
        threads.submit(lambda: None, 1).result(20)
    assert threads.submit(threading.current_thread, 1).result(20) is not thread
    threads.shutdown()


def test_without_a_thread_calls_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = SharedThreads(2, "shared")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    calls = [threads.submit(partial(int, number), 1 + number % 2) for number in range(50)]
    assert [call.result(0) for call in calls] == list(range(50))
    threads.shutdown()


def test_many_waiting_calls_are_all_told_that_the_threads_are_gone_as_at_the_end_of_the_process() -> None:
    code = """
import threading
from concurrent.futures import wait
from functools import partial
from typing import Any
from vecmill.core.threads import SharedThreads, _end_all
from vecmill.core.errors import WorkLost
threads, begun, gate = SharedThreads(2, "shared"), threading.Event(), threading.Event()
held = threads.submit(lambda: (begun.set(), gate.wait(20)), 2)
calls = [threads.submit(partial(int, 7), 1) for _ in range(2000)]
begun.wait(20)
threading.Timer(0.2, gate.set).start()
_end_all()
done, waiting = wait(calls, timeout=10)
assert not waiting, len(waiting)
assert {type(call.exception()) for call in done} <= {type(None), WorkLost}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_many_waiting_calls_are_made_in_order_where_the_system_gives_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = SharedThreads(1, "shared")
    calls: list[Future[None]] = []
    order: list[int] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    threads.submit(lambda: calls.extend(threads.submit(partial(order.append, each), 1) for each in range(2000)), 1)
    assert not wait(calls, timeout=5)[1]
    assert order == [*range(2000)]
    threads.shutdown()


def test_shared_threads_end_after_what_they_were_given() -> None:
    threads = SharedThreads(1, "shared")
    held = Held(threads)
    calls = [held.submit(name) for name in ("a", "b", "c")]
    held.have_begun("a")
    threads.shutdown()
    with pytest.raises(RuntimeError):
        held.submit("d")
    held.end("a", "b", "c")
    assert [call.result(20) for call in calls] == ["a", "b", "c"]


def test_a_call_gives_way_to_one_urgent_call_at_a_time_and_never_within_it() -> None:
    threads, begun, waiting = SharedThreads(1, "shared"), list[str](), threading.Event()

    def bulk() -> str:
        begun.append("bulk")
        assert waiting.wait(20)
        for step in range(4):
            give_way()
            begun.append(f"step {step}")
        return "bulk"

    def search(number: int) -> int:
        begun.append(f"search {number}")
        give_way()
        return number

    give_way()  # of nobody: nothing happens
    calls: list[Future[Any]] = [threads.submit(bulk, 1), threads.submit(lambda: begun.append("after"), 1)]
    searches = [threads.submit(partial(search, number), 1, urgent=True) for number in (1, 2)]
    waiting.set()
    assert [call.result(20) for call in (*calls, *searches)] == ["bulk", None, 1, 2]
    assert begun == ["bulk", "search 1", "step 0", "search 2", "step 1", "step 2", "step 3", "after"]
    threads.shutdown()


def test_no_call_gives_way_to_one_that_computes_with_more_threads() -> None:
    threads, begun, waiting = SharedThreads(2, "shared"), list[str](), threading.Event()

    def bulk(name: str) -> None:
        assert waiting.wait(20)
        give_way()
        begun.append(name)

    def fail() -> None:
        raise ValueError("broken")

    calls: list[Future[None]] = [threads.submit(partial(bulk, "narrow"), 1) for _ in range(2)]
    calls.append(threads.submit(lambda: begun.append("search"), 2, urgent=True))
    waiting.set()
    for call in calls:
        call.result(20)
    assert begun == ["narrow", "narrow", "search"]
    begun.clear()
    waiting.clear()
    wide = threads.submit(partial(bulk, "wide"), 2)
    failing = threads.submit(fail, 1, urgent=True)
    search = threads.submit(lambda: begun.append("search"), 2, urgent=True)
    waiting.set()
    wide.result(20)
    search.result(20)
    with pytest.raises(ValueError, match="broken"):
        failing.result(20)
    assert begun == ["wide", "search"], "one at a time: the failing call was the first"
    threads.shutdown()
