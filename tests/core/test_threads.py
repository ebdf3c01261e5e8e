"""Worker threads: whoever waits for one is answered, also when they end."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from contextlib import suppress

import pytest

from vecmill.core.errors import ShuttingDown, WorkLost
from vecmill.core.threads import SMALL, WorkerThreads


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
