"""Every future is resolved: when the batch works, fails, is abandoned, when the device dies, when the server ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from vecmill.core.errors import BatchFailed, DeadlineExceeded, EngineFailed, NonFiniteEmbedding, ShuttingDown
from vecmill.core.protocols import BatchResult, ForwardRunner
from vecmill.core.types import Lane, Prefix, Row, Vector
from vecmill.scheduler.lines import MOST_CLIENTS, SequenceResult, Sharing, WaitingLines
from vecmill.scheduler.policy import Budget, Cut, TurnTaker
from vecmill.scheduler.scheduler import Scheduler

BUDGET = Budget(max_batch_tokens=16, max_batch_size=4)
ONE_BY_ONE = Budget(max_batch_tokens=1, max_batch_size=1)
MODELS = ("m", "a", "b")


def scheduler_of(
    runner: ForwardRunner, budget: Budget = BUDGET, on_failure: Callable[[str], None] = lambda reason: None
) -> Scheduler:
    return Scheduler(runner, dict.fromkeys(MODELS, budget), on_failure=on_failure)


class SumRunner:
    """A runner whose vector is the sum of the row, so that an answer at the wrong place is seen."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        self.entered.set()
        await self.gate.wait()
        self.batches.append((model, [int(row.token_ids.sum()) for row in rows]))
        return BatchResult([np.array([row.token_ids.sum()], dtype=np.float32) for row in rows], 0.001)


class RaisingRunner(SumRunner):
    def __init__(self, error: Exception, times: int = 1) -> None:
        super().__init__()
        self.error, self.times = error, times

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        if self.times:
            self.times -= 1
            raise self.error
        return await super().run(model, rows, lane)


def ids(*values: int) -> Row:
    return Row(np.array(values, dtype=np.int32))


async def sums(futures: Sequence[asyncio.Future[SequenceResult]]) -> list[float]:
    async with asyncio.timeout(5):
        return [float(result.vector[0]) for result in await asyncio.gather(*futures)]


async def test_answers_come_back_in_order_however_they_were_cut() -> None:
    scheduler = scheduler_of(SumRunner())
    futures = scheduler.submit("m", [ids(*[1] * (1 + index % 7), index) for index in range(50)])
    assert await sums(futures) == [1 + index % 7 + index for index in range(50)]
    assert scheduler.stats.sequences == 50
    await scheduler.close()


async def test_a_batch_holds_one_model_and_the_oldest_goes_first() -> None:
    runner = SumRunner()
    scheduler = scheduler_of(runner)
    futures = [*scheduler.submit("a", [ids(1), ids(2)]), *scheduler.submit("b", [ids(3)])]
    await sums(futures)
    assert runner.batches == [("a", [1, 2]), ("b", [3])]
    await scheduler.close()


async def test_what_arrives_while_the_device_is_busy_shares_the_next_batch() -> None:
    runner = SumRunner()
    runner.gate.clear()
    scheduler = scheduler_of(runner)
    first = scheduler.submit("m", [ids(1)])
    await runner.entered.wait()
    second = scheduler.submit("m", [ids(2)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert scheduler.waiting[Lane.BULK] == 1
    later = [future for value in (3, 4, 5) for future in scheduler.submit("m", [ids(value)])]
    runner.gate.set()
    await sums([*first, *second, *later])
    assert [batch for _, batch in runner.batches] == [[1], [2, 3, 4, 5]]
    await scheduler.close()


async def test_an_abandoned_sequence_is_never_run() -> None:
    runner = SumRunner()
    runner.gate.clear()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    futures = scheduler.submit("m", [ids(value) for value in range(5)])
    await runner.entered.wait()
    futures[3].cancel()
    runner.gate.set()
    await sums([futures[0], futures[1], futures[2], futures[4]])
    assert [3] not in [batch for _, batch in runner.batches]
    assert scheduler.stats.abandoned == 1
    await scheduler.close()


async def test_a_batch_that_fails_fails_its_members_and_the_next_works(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = scheduler_of(RaisingRunner(RuntimeError("boom")))
    failing = scheduler.submit("m", [ids(1), ids(2)])
    for future in failing:
        with pytest.raises(BatchFailed, match="temporary"):
            await asyncio.wait_for(future, 5)
    assert await sums(scheduler.submit("m", [ids(7)])) == [7]
    assert "boom" in caplog.text
    await scheduler.close()


async def test_a_row_that_fails_fails_alone() -> None:
    class OneBadRow(SumRunner):
        async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
            result = await super().run(model, rows, lane)
            result.rows[1] = NonFiniteEmbedding()
            return result

    scheduler = scheduler_of(OneBadRow())
    good, bad, other = scheduler.submit("m", [ids(1), ids(2), ids(3)])
    assert await sums([good, other]) == [1, 3]
    with pytest.raises(NonFiniteEmbedding):
        await bad
    await scheduler.close()


async def test_a_runner_that_answers_too_few_rows_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    class Short(SumRunner):
        async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
            result = await super().run(model, rows, lane)
            return BatchResult(result.rows[:-1], 0.001)

    scheduler = scheduler_of(Short())
    *_, last = scheduler.submit("m", [ids(1), ids(2)])
    with pytest.raises(BatchFailed):
        await asyncio.wait_for(last, 5)
    await scheduler.close()


async def test_a_dead_device_fails_all_that_wait_and_says_so_once() -> None:
    reasons: list[str] = []
    scheduler = scheduler_of(RaisingRunner(EngineFailed("gone"), times=99), on_failure=reasons.append)
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
    scheduler = scheduler_of(runner, ONE_BY_ONE)
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


class GatedRunner(SumRunner):
    """Each batch waits until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: list[Lane] = []
        self.begun = 0
        self.permits = asyncio.Semaphore(0)
        self.changed = asyncio.Condition()

    async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
        self.lanes.append(lane)
        self.begun += 1
        async with self.changed:
            self.changed.notify_all()
        await self.permits.acquire()
        return await super().run(model, rows, lane)

    async def wait_until_begun(self, batches: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.begun >= batches)


async def test_a_search_is_cut_at_once_though_bulk_fills_the_device() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    bulk = scheduler.submit("m", [ids(value) for value in range(20)])
    await runner.wait_until_begun(2)
    [query] = scheduler.submit("m", [ids(99)], lane=Lane.INTERACTIVE)
    await runner.wait_until_begun(3)
    assert runner.lanes == [Lane.BULK, Lane.BULK, Lane.INTERACTIVE]
    for _ in range(30):
        runner.permits.release()
    assert await sums([query, *bulk]) == [99, *range(20)]
    await scheduler.close()


async def test_a_batch_that_is_full_is_ready_before_the_device_is() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner)
    futures = scheduler.submit("m", [ids(value) for value in range(12)])
    await runner.wait_until_begun(2)
    assert scheduler.waiting[Lane.BULK] == 12 - 2 * BUDGET.max_batch_size
    for _ in range(3):
        runner.permits.release()
    assert await sums(futures) == list(range(12))
    await scheduler.close()


async def test_searches_that_come_together_share_a_batch_behind_bulk() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner)
    bulk = scheduler.submit("m", [ids(value) for value in range(12)])
    await runner.wait_until_begun(2)
    searches = [*scheduler.submit("m", [ids(50)], lane=Lane.INTERACTIVE, client="a")]
    await runner.wait_until_begun(3)
    searches += [future for value in (51, 52) for future in scheduler.submit("m", [ids(value)], lane=Lane.INTERACTIVE)]
    for _ in range(9):
        runner.permits.release()
    await sums([*bulk, *searches])
    assert any({51, 52} <= set(batch) for _, batch in runner.batches)
    await scheduler.close()


async def test_two_clients_take_turns() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    first = scheduler.submit("m", [ids(value) for value in range(10)], client="first")
    await runner.wait_until_begun(2)
    second = scheduler.submit("m", [ids(100 + value) for value in range(3)], client="second")
    for _ in range(20):
        runner.permits.release()
    await sums([*first, *second])
    order = [value for _, batch in runner.batches for value in batch]
    assert order.index(102) < order.index(6)
    await scheduler.close()


async def test_equal_rows_in_flight_run_once_and_all_who_wait_are_answered() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    first = scheduler.submit("m", [ids(1), ids(2), ids(3), ids(3)])
    await runner.wait_until_begun(2)
    again = scheduler.submit("m", [ids(1), ids(3)], client="other")
    elsewhere = scheduler.submit("a", [ids(3)])
    for _ in range(10):
        runner.permits.release()
    assert await sums([*first, *again, *elsewhere]) == [1, 2, 3, 3, 1, 3, 3]
    assert sorted(runner.batches) == [("a", [3]), ("m", [1]), ("m", [2]), ("m", [3])]
    assert scheduler.stats.joined == 3
    await scheduler.close()


async def test_a_search_for_what_waits_in_bulk_lifts_it_out() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    bulk = scheduler.submit("m", [ids(value) for value in range(20)])
    await runner.wait_until_begun(2)
    [query] = scheduler.submit("m", [ids(19)], lane=Lane.INTERACTIVE)
    await runner.wait_until_begun(3)
    for _ in range(30):
        runner.permits.release()
    assert await sums([query, *bulk]) == [19, *range(20)]
    assert runner.batches[2] == ("m", [19])
    assert len(runner.batches) == 20
    assert scheduler.waiting == dict.fromkeys(Lane, 0)
    await scheduler.close()


async def test_one_who_leaves_does_not_take_the_answer_from_another() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    blocking = scheduler.submit("m", [ids(1), ids(2)])
    await runner.wait_until_begun(2)
    [leaving], [staying] = scheduler.submit("m", [ids(7)]), scheduler.submit("m", [ids(7)], client="other")
    leaving.cancel()
    for _ in range(5):
        runner.permits.release()
    assert await sums([*blocking, staying]) == [1, 2, 7]
    assert scheduler.stats.abandoned == 0
    await scheduler.close()


async def test_what_has_expired_is_never_run() -> None:
    now = 0.0
    runner = GatedRunner()
    scheduler = Scheduler(runner, {"m": ONE_BY_ONE}, clock=lambda: now)
    blocking = scheduler.submit("m", [ids(1), ids(2)])
    await runner.wait_until_begun(2)
    [late] = scheduler.submit("m", [ids(7)], deadline=10.0)
    [patient] = scheduler.submit("m", [ids(8)], deadline=30.0)
    now = 20.0
    for _ in range(5):
        runner.permits.release()
    assert await sums([*blocking, patient]) == [1, 2, 8]
    with pytest.raises(DeadlineExceeded):
        await late
    assert [7] not in [batch for _, batch in runner.batches]
    assert scheduler.stats.expired == 1
    await scheduler.close()


async def test_it_says_when_the_batch_on_the_device_will_be_done() -> None:
    """A search that arrives meanwhile goes next, as the runner takes it; then the bulk behind it."""
    now = 0.0
    runner = GatedRunner()
    scheduler = Scheduler(
        runner, {"m": ONE_BY_ONE}, expected_seconds=lambda model, tokens: float(tokens), clock=lambda: now
    )
    assert scheduler.rest_of_pass == 0.0
    first, second = scheduler.submit("m", [ids(*range(5)), ids(*range(10))])
    await runner.wait_until_begun(2)
    search = scheduler.submit("m", [ids(1, 2)], lane=Lane.INTERACTIVE)
    await runner.wait_until_begun(3)
    now = 1.0
    assert scheduler.rest_of_pass == 4.0

    now = 7.0  # later than expected
    assert scheduler.rest_of_pass == 0.0
    runner.permits.release()
    await first
    assert scheduler.rest_of_pass == 2.0
    runner.permits.release()
    runner.permits.release()
    await asyncio.gather(second, *search)
    assert scheduler.rest_of_pass == 0.0
    await scheduler.close()


async def test_what_is_answered_before_the_batch_ahead_of_it_does_not_end_that() -> None:
    """On a CPU a search takes the first thread that is free, while another still runs bulk."""

    class Overtaking(GatedRunner):
        async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
            if lane is Lane.INTERACTIVE:
                return await SumRunner.run(self, model, rows, lane)
            return await super().run(model, rows, lane)

    now = 0.0
    runner = Overtaking()
    scheduler = Scheduler(
        runner, {"m": ONE_BY_ONE}, expected_seconds=lambda model, tokens: float(tokens), clock=lambda: now
    )
    [bulk] = scheduler.submit("m", [ids(*range(5))])
    await runner.wait_until_begun(1)
    now = 1.0
    assert await sums(scheduler.submit("m", [ids(7)], lane=Lane.INTERACTIVE)) == [7]
    assert scheduler.rest_of_pass == 4.0
    runner.permits.release()
    await bulk
    assert scheduler.rest_of_pass == 0.0
    await scheduler.close()


async def test_a_batch_that_had_to_be_halved_lowers_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    class Small(SumRunner):
        async def run(self, model: str, rows: Sequence[Row], lane: Lane = Lane.BULK) -> BatchResult:
            result = await super().run(model, rows, lane)
            return BatchResult(result.rows, result.seconds, splits=2, fitting_tokens=100)

    scheduler = scheduler_of(Small(), Budget(max_batch_tokens=400, max_batch_size=64, free_tokens=300))
    assert len(await sums(scheduler.submit("m", [ids(*range(100)) for _ in range(4)]))) == 4
    assert scheduler.budgets["m"] == Budget(100, 64, 100)
    assert scheduler.budgets["a"].max_batch_tokens == 400
    assert scheduler.stats.splits == 2
    assert "out of memory" in caplog.text
    scheduler.change_budget("m", Budget(max_batch_tokens=800, max_batch_size=64, free_tokens=500))
    assert scheduler.budgets["m"] == Budget(100, 64, 100), "what did not fit still does not"
    scheduler.change_budget("m", Budget(max_batch_tokens=80, max_batch_size=64, free_tokens=50))
    assert scheduler.budgets["m"] == Budget(80, 64, 50)
    scheduler.set_budget("m", Budget(800, 64, 500))  # it was loaded anew
    assert scheduler.budgets["m"] == Budget(800, 64, 500)
    await scheduler.close()


async def test_clients_come_and_go_and_only_so_many_are_remembered() -> None:
    def remembered() -> int:
        gc.collect()
        return sum(type(each) is Sharing for each in gc.get_objects())

    before = remembered()
    scheduler = scheduler_of(SumRunner())
    for client in range(MOST_CLIENTS + 500):
        await sums(scheduler.submit("m", [ids(client)], client=str(client)))
    assert remembered() - before == MOST_CLIENTS
    await scheduler.close()


async def test_the_client_that_was_away_longest_is_forgotten_first() -> None:
    lines = WaitingLines()

    def come_and_go(name: str) -> TurnTaker:
        client = lines.join("m", Lane.BULK, name, 0.0).client
        lines.leave(Cut("m", Lane.BULK), 0.0)  # nothing of it waits any more
        return client

    first, second = come_and_go("first"), come_and_go("second")
    for number in range(MOST_CLIENTS - 2):
        come_and_go(str(number))
    assert come_and_go("first") is first
    come_and_go("one more")
    assert come_and_go("first") is first
    assert come_and_go("second") is not second


async def order_of(runner: GatedRunner, *futures: asyncio.Future[SequenceResult]) -> list[float]:
    """Let everything run, one text per batch. Returns the texts in the order in which they ran."""
    for _ in range(1000):
        runner.permits.release()
    await sums(futures)
    return [value for _, batch in runner.batches for value in batch]


async def test_jobs_divide_what_their_client_gets_and_nobody_elses() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    greedy = [
        future
        for number in range(200)
        for future in scheduler.submit("m", [ids(number)], client="greedy", job=f"job {number}")
    ]
    await runner.wait_until_begun(2)
    neighbour = scheduler.submit("m", [ids(1000 + value) for value in range(5)], client="neighbour")
    order = await order_of(runner, *greedy, *neighbour)
    assert order.index(1004) <= 12
    await scheduler.close()


async def test_the_jobs_of_one_client_take_turns() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    first = scheduler.submit("m", [ids(value) for value in range(10)], client="one", job="first")
    await runner.wait_until_begun(2)
    second = scheduler.submit("m", [ids(100 + value) for value in range(3)], client="one", job="second")
    order = await order_of(runner, *first, *second)
    assert order.index(102) < order.index(6)
    await scheduler.close()


async def test_jobs_that_stand_still_give_their_client_no_precedence() -> None:
    """One of many jobs always waits longest, but only a client that gets nothing is aged."""
    now = 0.0
    runner = GatedRunner()
    scheduler = Scheduler(runner, dict.fromkeys(MODELS, ONE_BY_ONE), clock=lambda: now)
    greedy = [
        future
        for number in range(60)
        for future in scheduler.submit("m", [ids(number)], client="greedy", job=f"job {number}")
    ]
    neighbour = scheduler.submit("m", [ids(1000 + value) for value in range(30)], client="neighbour")
    await runner.wait_until_begun(2)
    begun = 2
    while begun < 40:
        now += 1.0
        runner.permits.release()
        begun += 1
        await runner.wait_until_begun(begun)
    order = await order_of(runner, *greedy, *neighbour)
    assert sum(value >= 1000 for value in order[:40]) >= 15
    await scheduler.close()


async def test_two_models_of_one_client_keep_one_share_however_many_clients_there_were() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    for _ in range(5000):
        runner.permits.release()
    for number in range(1100):
        await sums(scheduler.submit("m", [ids(7)], client=f"client {number}"))
    runner.permits = asyncio.Semaphore(0)
    begun = runner.begun
    held = scheduler.submit("m", [ids(1), ids(2)], client="someone")
    await runner.wait_until_begun(begun + 2)
    ours = [
        future
        for value in range(20)
        for model in ("a", "b")
        for future in scheduler.submit(model, [ids(value)], client="two models")
    ]
    theirs = scheduler.submit("m", [ids(100 + value) for value in range(20)], client="one model")
    runner.batches.clear()
    order = await order_of(runner, *held, *ours, *theirs)
    assert 18 <= sum(value >= 100 for value in order[2:42]) <= 20
    await scheduler.close()


async def test_an_equal_text_waits_for_nobody_elses_turn() -> None:
    runner = GatedRunner()
    scheduler = scheduler_of(runner, ONE_BY_ONE)
    greedy = scheduler.submit("m", [ids(value) for value in range(100)], client="greedy")
    await runner.wait_until_begun(2)
    [same] = scheduler.submit("m", [ids(99)], client="neighbour")
    order = await order_of(runner, *greedy, same)
    assert order.index(99) < 5
    assert len(order) == 100
    assert scheduler.stats.joined == 1
    await scheduler.close()


async def test_texts_apart_are_not_taken_for_equal() -> None:
    scheduler = scheduler_of(SumRunner())
    await sums([*scheduler.submit("m", [ids(1)], partition="one"), *scheduler.submit("m", [ids(1)], partition="other")])
    assert scheduler.stats.joined == 0
    await scheduler.close()


async def test_one_models_texts_do_not_fill_the_batch_of_another() -> None:
    """A batch is launched behind a busy device once it is full, judged by its own model's texts and budget."""
    runner = GatedRunner()
    budgets = {
        "a": Budget(max_batch_tokens=100, max_batch_size=64),
        "b": Budget(max_batch_tokens=100, max_batch_size=64),
    }
    scheduler = Scheduler(runner, budgets)
    futures = scheduler.submit("a", [ids(1)])
    await runner.wait_until_begun(1)
    futures += scheduler.submit("a", [ids(*[1] * 60)])
    futures += scheduler.submit("b", [ids(*[1] * 61)])
    for _ in range(10):
        await asyncio.sleep(0)
    assert runner.begun == 1
    futures += scheduler.submit("a", [ids(*[1] * 40)])
    await runner.wait_until_begun(2)
    for _ in range(9):
        runner.permits.release()
    await sums(futures)
    await scheduler.close()


async def test_a_shared_prefix_fills_a_batch_once() -> None:
    runner = GatedRunner()
    scheduler = Scheduler(runner, {"m": Budget(max_batch_tokens=100, max_batch_size=64)})
    prefix = Prefix(np.ones(40, dtype=np.int32))
    futures = scheduler.submit("m", [ids(1)])
    await runner.wait_until_begun(1)
    futures += scheduler.submit("m", [Row(np.full(10, value, dtype=np.int32), prefix) for value in range(5)])
    for _ in range(10):
        await asyncio.sleep(0)
    assert runner.begun == 1  # 90 tokens, not 250
    futures += scheduler.submit("m", [Row(np.full(10, 9, dtype=np.int32), prefix)])
    await runner.wait_until_begun(2)
    for _ in range(9):
        runner.permits.release()
    await sums(futures)
    await scheduler.close()


async def test_long_texts_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """On a slow device most texts may be longer than a forward pass; the line of their request has their tokens."""
    caplog.set_level("INFO")
    scheduler = scheduler_of(SumRunner(), ONE_BY_ONE)
    assert await sums(scheduler.submit("m", [ids(1, 2, 3)] * 4)) == [6] * 4
    await scheduler.close()
    assert caplog.messages == []


async def test_rows_that_end_with_an_error_leave_nothing_behind_that_is_never_run() -> None:
    def rows() -> Iterator[Row]:
        yield ids(1)
        raise ValueError("no more")

    scheduler = scheduler_of(SumRunner())
    with pytest.raises(ValueError, match="no more"):
        scheduler.submit("m", rows())
    assert await sums(scheduler.submit("m", [ids(1), ids(2)])) == [1, 2]  # an equal row may have joined the first
    assert scheduler.waiting[Lane.BULK] == 0
    assert scheduler.queued["m", Lane.BULK] == (0, 0)
    await scheduler.close()


async def test_vectors_are_kept_under_their_keys_once_a_batch() -> None:
    kept: list[list[tuple[bytes, float]]] = []
    scheduler = scheduler_of(SumRunner())

    def keep(vectors: list[tuple[bytes, Vector]]) -> None:
        kept.append([(key, float(vector[0])) for key, vector in vectors])

    rows, keys = [ids(value) for value in (1, 2, 3, 1)], [b"one", None, b"three", b"one again"]
    await sums(scheduler.submit("m", rows, keep=keep, keys=keys))
    assert kept == [[(b"one", 1.0), (b"three", 3.0)]]
    await scheduler.close()
