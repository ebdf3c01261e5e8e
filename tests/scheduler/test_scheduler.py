"""Every future is resolved: when the batch works, fails, is abandoned, when the device dies, when the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from vecmill.core.errors import BatchFailed, EngineFailed, NonFiniteEmbedding, ShuttingDown
from vecmill.core.protocols import BatchResult
from vecmill.core.types import Row
from vecmill.scheduler.policy import Budget
from vecmill.scheduler.scheduler import Scheduler
from vecmill.scheduler.sequence import SequenceResult

Run = Callable[[str, Sequence[Row]], Awaitable[BatchResult]]

BUDGET = Budget(max_batch_tokens=16, max_batch_size=4)


class SumRunner:
    """A runner whose vector is the sum of the row, so that an answer at the wrong place is seen."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()

    async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
        self.entered.set()
        await self.gate.wait()
        self.batches.append((model, [int(row.token_ids.sum()) for row in rows]))
        return BatchResult([np.array([row.token_ids.sum()], dtype=np.float32) for row in rows], 0.001)


class RaisingRunner(SumRunner):
    def __init__(self, error: Exception, times: int = 1) -> None:
        super().__init__()
        self.error, self.times = error, times

    async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
        if self.times:
            self.times -= 1
            raise self.error
        return await super().run(model, rows)


def ids(*values: int) -> Row:
    return Row(np.array(values, dtype=np.int32))


async def sums(futures: Sequence[asyncio.Future[SequenceResult]]) -> list[float]:
    async with asyncio.timeout(5):
        return [float(result.vector[0]) for result in await asyncio.gather(*futures)]


async def test_answers_come_back_in_order_however_they_were_cut() -> None:
    scheduler = Scheduler(SumRunner(), BUDGET)
    futures = scheduler.submit("m", [ids(*[1] * (1 + index % 7), index) for index in range(50)])
    assert await sums(futures) == [1 + index % 7 + index for index in range(50)]
    assert scheduler.stats.sequences == 50
    await scheduler.close()


async def test_a_batch_holds_one_model_and_the_oldest_goes_first() -> None:
    runner = SumRunner()
    scheduler = Scheduler(runner, BUDGET)
    futures = [*scheduler.submit("a", [ids(1), ids(2)]), *scheduler.submit("b", [ids(3)])]
    await sums(futures)
    assert runner.batches == [("a", [1, 2]), ("b", [3])]
    await scheduler.close()


async def test_what_arrives_while_the_device_is_busy_shares_the_next_batch() -> None:
    runner = SumRunner()
    runner.gate.clear()
    scheduler = Scheduler(runner, BUDGET)
    first = scheduler.submit("m", [ids(1)])
    await runner.entered.wait()
    second = scheduler.submit("m", [ids(2)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    later = [future for value in (3, 4, 5) for future in scheduler.submit("m", [ids(value)])]
    runner.gate.set()
    await sums([*first, *second, *later])
    assert [batch for _, batch in runner.batches] == [[1], [2], [3, 4, 5]]
    await scheduler.close()


async def test_an_abandoned_sequence_is_never_run() -> None:
    runner = SumRunner()
    runner.gate.clear()
    scheduler = Scheduler(runner, Budget(max_batch_tokens=1, max_batch_size=1))
    futures = scheduler.submit("m", [ids(value) for value in range(5)])
    await runner.entered.wait()
    futures[3].cancel()
    runner.gate.set()
    await sums([futures[0], futures[1], futures[2], futures[4]])
    assert [3] not in [batch for _, batch in runner.batches]
    assert scheduler.stats.abandoned == 1
    await scheduler.close()


async def test_a_batch_that_fails_fails_its_members_and_the_next_works(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(RaisingRunner(RuntimeError("boom")), BUDGET)
    failing = scheduler.submit("m", [ids(1), ids(2)])
    for future in failing:
        with pytest.raises(BatchFailed, match="temporary"):
            await asyncio.wait_for(future, 5)
    assert await sums(scheduler.submit("m", [ids(7)])) == [7]
    assert "boom" in caplog.text
    await scheduler.close()


async def test_a_row_that_fails_fails_alone() -> None:
    class OneBadRow(SumRunner):
        async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
            result = await super().run(model, rows)
            result.rows[1] = NonFiniteEmbedding()
            return result

    scheduler = Scheduler(OneBadRow(), BUDGET)
    good, bad, other = scheduler.submit("m", [ids(1), ids(2), ids(3)])
    assert await sums([good, other]) == [1, 3]
    with pytest.raises(NonFiniteEmbedding):
        await bad
    await scheduler.close()


async def test_a_runner_that_answers_too_few_rows_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    class Short(SumRunner):
        async def run(self, model: str, rows: Sequence[Row]) -> BatchResult:
            result = await super().run(model, rows)
            return BatchResult(result.rows[:-1], 0.001)

    scheduler = Scheduler(Short(), BUDGET)
    *_, last = scheduler.submit("m", [ids(1), ids(2)])
    with pytest.raises(BatchFailed):
        await asyncio.wait_for(last, 5)
    await scheduler.close()


async def test_a_dead_device_fails_all_that_wait_and_says_so_once() -> None:
    reasons: list[str] = []
    scheduler = Scheduler(RaisingRunner(EngineFailed("gone"), times=99), BUDGET, on_failure=reasons.append)
    futures = scheduler.submit("m", [ids(value) for value in range(40)])
    done, waiting = await asyncio.wait(futures, timeout=5)
    assert not waiting
    assert all(isinstance(future.exception(), EngineFailed) for future in done)
    with pytest.raises(EngineFailed, match="gone"):
        scheduler.submit("m", [ids(1)])
    assert reasons == ["gone"]
    await scheduler.close()


async def test_closing_answers_what_runs_and_fails_what_waits() -> None:
    runner = SumRunner()
    runner.gate.clear()
    scheduler = Scheduler(runner, Budget(max_batch_tokens=1, max_batch_size=1))
    futures = scheduler.submit("m", [ids(value) for value in range(6)])
    await runner.entered.wait()
    closing = asyncio.create_task(scheduler.close())
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.wait_for(closing, 5)
    assert futures[0].result().vector[0] == 0
    assert isinstance(futures[5].exception(), ShuttingDown)
    assert all(future.done() for future in futures)
    for future in futures:
        future.exception()
    with pytest.raises(ShuttingDown):
        scheduler.submit("m", [ids(1)])
