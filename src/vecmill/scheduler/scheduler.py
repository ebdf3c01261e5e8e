"""The loop that empties the lines into a `ForwardRunner`, and the promise that every future is resolved."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from time import monotonic

from vecmill.core.errors import (
    BatchFailed,
    DeadlineExceeded,
    EngineFailed,
    ShuttingDown,
    VecmillError,
    as_refusal,
)
from vecmill.core.protocols import BatchResult, ForwardRunner
from vecmill.core.types import Lane, PassRecord, Row, Vector
from vecmill.scheduler.lines import Backlog, Keep, Sequence, SequenceResult, WaitingLines, duplicate_key
from vecmill.scheduler.policy import Budget, Cut, Rules, cut

logger = logging.getLogger(__name__)

LAST_BATCHES_SECONDS = 2.0  # for what is on the device when the scheduler is closed
FEWEST_TOKENS = 64  # that a budget is lowered to when the device's memory does not hold more


@dataclass(slots=True)
class LaneStats:
    """Counters since the start, of one model in one lane."""

    batches: int = 0
    sequences: int = 0
    """Run on the device, in batches of this lane."""
    tokens: int = 0
    """Of those."""
    joined: int = 0
    """Texts that waited for an equal one instead of being run."""
    abandoned: int = 0
    """Texts whose client had left before they were run."""
    expired: int = 0
    """Texts whose deadline had passed before they were run."""
    splits: int = 0
    """Batches halved because they did not fit into the device's memory."""


def _sum(name: str) -> property:
    return property(lambda stats: sum(getattr(counters, name) for counters in stats.by_lane.values()))


class SchedulerStats:
    """Counters since the start; read by telemetry."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        self.by_lane: dict[tuple[str, Lane], LaneStats] = {}
        for model in models:
            self.begin(model)

    def begin(self, model: str) -> None:
        """Count for a model too, from what was counted before if it has been loaded before."""
        for lane in Lane:
            self.by_lane.setdefault((model, lane), LaneStats())

    # Over all models and lanes:
    batches = _sum("batches")
    sequences = _sum("sequences")
    tokens = _sum("tokens")
    joined = _sum("joined")
    abandoned = _sum("abandoned")
    expired = _sum("expired")
    splits = _sum("splits")


OnBatch = Callable[[PassRecord], None]
"""Called after every batch."""


class Scheduler:
    """Cuts batches for a `ForwardRunner`. All methods belong to the event loop's thread."""

    def __init__(
        self,
        runner: ForwardRunner,
        budgets: Mapping[str, Budget],
        rules: Rules | None = None,
        *,
        on_batch: OnBatch = lambda batch: None,
        on_failure: Callable[[str], None] = lambda reason: None,
        expected_seconds: Callable[[str, int], float] = lambda model, tokens: 0.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`budgets` by model; `on_failure` is called once, with why nothing can be run any more.

        `expected_seconds`: of a forward pass of a model with so many tokens.
        """
        self.stats = SchedulerStats(budgets)
        self.budgets = dict(budgets)
        self.waiting = dict.fromkeys(Lane, 0)
        """Sequences not yet in a batch, by the lane of their first submitter."""
        self._backlog = Backlog()
        self._runner = runner
        self._rules = rules or Rules()
        self._on_batch, self._on_failure, self._clock = on_batch, on_failure, clock
        self._expected_seconds = expected_seconds
        self._fitting: dict[str, int] = {}
        """Tokens of a model's largest pass, where larger ones did not fit into the memory."""
        self._lines = WaitingLines()
        self._owed = 0.0
        self._unanswered: dict[Hashable, Sequence] = {}
        self._in_flight = InFlight()
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._closed: VecmillError | None = None
        self._loop = asyncio.create_task(self._cut_forever(), name="scheduler")
        self._loop.add_done_callback(self._loop_ended)

    @property
    def queued(self) -> Mapping[tuple[str, Lane], tuple[int, int]]:
        """Texts and tokens that wait for a batch, by model and lane."""
        rows, tokens = self._backlog.rows, self._backlog.tokens
        return {(model, lane): (rows[model, lane], tokens[model, lane]) for model in self.budgets for lane in Lane}

    @property
    def rest_of_pass(self) -> float:
        """Seconds until the batch on the device is done, as expected; 0.0 where none is."""
        return self._in_flight.rest(self._clock())

    @property
    def busy(self) -> bool:
        """Whether a row submitted now has to wait: a batch runs, or others wait."""
        return bool(self._running) or any(self.waiting.values())

    def has_rows(self, model: str) -> bool:
        """Whether rows of a model wait or run, also those that nobody waits for any more."""
        return any(sequence.model == model for sequence in self._unanswered.values())

    def submit(
        self,
        model: str,
        rows: Iterable[Row],
        *,
        lane: Lane = Lane.BULK,
        client: str = "",
        job: str = "",
        partition: str = "",
        deadline: float = float("inf"),
        keep: Keep | None = None,
        keys: Iterable[bytes | None] = repeat(None),
    ) -> list[asyncio.Future[SequenceResult]]:
        """Queue rows and return one future for each, in order. Rows equal to one in flight wait for that one.

        Clients take turns, and the `job`s of one client share its turns. Equal rows of different `partition`s each run.
        `keep` is given the vectors of the rows that have one of the `keys`, even if nobody waits for them any more.

        A row is not run if all its futures are cancelled, or its `deadline` (monotonic) has passed, before its batch.

        Raises:
            ShuttingDown, EngineFailed: the scheduler takes no work any more.
        """
        if self._closed is not None:
            raise self._closed.again()
        create_future = asyncio.get_running_loop().create_future
        futures = []
        queue = _Queue(self._clock(), model, lane, (lane, client, job))
        try:
            for row, kept_under in zip(rows, keys, strict=False):
                future: asyncio.Future[SequenceResult] = create_future()
                sequence = self._queue((partition, duplicate_key(model, row)), row, queue)
                sequence.join(future, deadline)
                if keep is not None and kept_under is not None and sequence.keep is None:
                    sequence.keep = keep, kept_under
                futures.append(future)
        finally:  # also where the rows end with an error: what others may join must be run
            self.waiting[lane] += len(queue.new)
            self._backlog.add(model, lane, queue.new)
            if queue.joining:
                # In the line of each who asks for it: nobody waits for the turn of another client.
                self._lines.join(model, lane, client, queue.now, job).waiting.extend(queue.joining)
        self._wake.set()
        return futures

    def _queue(self, key: Hashable, row: Row, queue: _Queue) -> Sequence:
        waiting = self._unanswered.get(key)
        if waiting is not None:
            self.stats.by_lane[queue.model, queue.lane].joined += 1
            if waiting.taken or queue.stand in waiting.stands_in:
                return waiting
        else:
            waiting = Sequence(row, queue.model, key, queue.lane, len(row), row.prefix, submitted=queue.now)
            self._unanswered[key] = waiting
            queue.new.append(waiting)
        waiting.stands_in.add(queue.stand)
        queue.joining.append(waiting)
        return waiting

    async def close(self) -> None:
        """Refuse new work, let running batches end if they soon do, fail whatever still waits."""
        self._closed = self._closed or ShuttingDown()
        self._fail_waiting(self._closed)
        self._loop.cancel()
        running = {self._loop, *self._running}
        _, late = await asyncio.wait(running, timeout=LAST_BATCHES_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _cut_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._may_cut():
                now = self._clock()
                taken = cut(list(self._lines), self.budgets, self._rules, self._owed, now)
                if not taken.popped:
                    break
                self._apply(taken, now)
                if taken.batch:
                    self._start(taken)
                await asyncio.sleep(0)

    def _may_cut(self) -> bool:
        full = any(self._backlog.fills(model, budget) for model, budget in self.budgets.items())
        return self._in_flight.has_room(full=full, interactive=self._lines.waits(Lane.INTERACTIVE))

    def _apply(self, taken: Cut[Sequence], now: float) -> None:
        self._lines.leave(taken, now)
        self._owed = taken.owed
        self._leave_queue(taken.batch)
        unwanted = [sequence for sequence in dict.fromkeys(taken.unwanted) if not sequence.taken]
        self._leave_queue(unwanted)
        for sequence in unwanted:
            del self._unanswered[sequence.key]
            counters = self.stats.by_lane[sequence.model, sequence.lane]
            if now >= sequence.deadline:
                counters.expired += 1
            else:
                counters.abandoned += 1
            sequence.resolve(DeadlineExceeded())

    def _leave_queue(self, sequences: Iterable[Sequence]) -> None:
        leaving: dict[tuple[str, Lane], list[Sequence]] = {}
        for sequence in sequences:
            sequence.taken = True
            leaving.setdefault((sequence.model, sequence.lane), []).append(sequence)
        for (model, lane), left in leaving.items():
            self._backlog.remove(model, lane, left)
            self.waiting[lane] -= len(left)

    def _start(self, taken: Cut[Sequence]) -> None:
        expected = self._expected_seconds(taken.model, taken.tokens)
        number = self._in_flight.begin(taken.lane, expected, self._clock())
        task = asyncio.create_task(self._run(taken, number), name="batch")
        self._running.add(task)
        task.add_done_callback(self._batch_ended)

    async def _run(self, taken: Cut[Sequence], number: int) -> None:
        try:
            await self._run_and_resolve(taken, number)
        except EngineFailed as error:
            self._resolve(taken.batch, error)
            self._stop(error)
        except VecmillError as error:
            self._resolve(taken.batch, error)
        except Exception as error:
            refusal = as_refusal(error)
            if isinstance(refusal, VecmillError):
                self._resolve(taken.batch, refusal)
            else:
                logger.exception("a batch of %d inputs failed", len(taken.batch))
        finally:
            # Whatever happened, nobody is left waiting.
            self._resolve(taken.batch, BatchFailed())

    async def _run_and_resolve(self, taken: Cut[Sequence], number: int) -> None:
        if taken.tokens > self.budgets[taken.model].max_batch_tokens:
            logger.debug("a text of %d tokens runs alone, longer than the budget of a forward pass", taken.tokens)
        started = self._clock()
        try:
            result = await self._runner.run(taken.model, [sequence.row for sequence in taken.batch], taken.lane)
        except Exception:
            self._report(taken, self._clock() - started, failed=True)
            raise
        finally:
            self._in_flight.end(number, self._clock())
        self._count(taken, result)
        kept: dict[Keep, list[tuple[bytes, Vector]]] = {}
        for sequence, row in zip(taken.batch, result.rows, strict=True):
            self._unanswered.pop(sequence.key, None)
            if isinstance(row, Exception):
                sequence.resolve(row)
                continue
            if sequence.keep is not None:
                keep, key = sequence.keep
                kept.setdefault(keep, []).append((key, row))
            sequence.resolve(SequenceResult(row, started - sequence.submitted))
        for keep, vectors in kept.items():
            keep(vectors)

    def _count(self, taken: Cut[Sequence], result: BatchResult) -> None:
        counters = self.stats.by_lane[taken.model, taken.lane]
        counters.batches += 1
        counters.sequences += len(taken.batch)
        counters.tokens += taken.tokens
        counters.splits += result.splits
        representative = not result.overlapped and all(sequence.row.prefix is None for sequence in taken.batch)
        self._report(taken, result.seconds, splits=result.splits, representative=representative)
        if result.splits and result.fitting_tokens is not None:
            self._lower_budget(taken.model, result.fitting_tokens)

    def _report(
        self,
        taken: Cut[Sequence],
        seconds: float,
        *,
        splits: int = 0,
        failed: bool = False,
        representative: bool = False,
    ) -> None:
        fill = taken.tokens / self.budgets[taken.model].max_batch_tokens
        rows = len(taken.batch)
        self._on_batch(
            PassRecord(taken.model, taken.lane, rows, taken.tokens, fill, seconds, splits, failed, representative)
        )

    def set_budget(self, model: str, budget: Budget) -> None:
        """What a forward pass of a model may hold from now on; the model may be new."""
        self.stats.begin(model)
        self._fitting.pop(model, None)
        self.budgets[model] = budget

    def change_budget(self, model: str, budget: Budget) -> None:
        """As `set_budget`, of a model that is served: what did not fit into the memory still does not."""
        most = self._fitting.get(model, budget.max_batch_tokens)
        self.budgets[model] = replace(
            budget,
            max_batch_tokens=min(budget.max_batch_tokens, most),
            free_tokens=min(budget.free_tokens, most),
        )

    def _lower_budget(self, model: str, fitting_tokens: int) -> None:
        budget = self.budgets[model]
        tokens = min(budget.max_batch_tokens, max(FEWEST_TOKENS, fitting_tokens))
        if tokens < budget.max_batch_tokens:
            logger.warning("out of memory: forward passes of %s hold %d tokens at most from now on", model, tokens)
            self._fitting[model] = tokens
            self.budgets[model] = replace(budget, max_batch_tokens=tokens, free_tokens=min(budget.free_tokens, tokens))

    def _batch_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("the scheduler's loop ended", exc_info=task.exception())
            self._stop(EngineFailed("503: the scheduler failed and the server must be restarted."))

    def _stop(self, error: VecmillError) -> None:
        if self._closed is None:
            self._closed = error
            self._on_failure(error.message)
        self._fail_waiting(error)

    def _fail_waiting(self, error: VecmillError) -> None:
        waiting = [sequence for sequence in dict.fromkeys(self._lines.clear()) if not sequence.taken]
        self._leave_queue(waiting)
        self._resolve(waiting, error)

    def _resolve(self, sequences: Iterable[Sequence], error: VecmillError) -> None:
        for sequence in sequences:
            self._unanswered.pop(sequence.key, None)
            sequence.resolve(error)


@dataclass(slots=True)
class _Queue:
    """Rows that are submitted together."""

    now: float
    model: str
    lane: Lane
    stand: tuple[Lane, str, str]
    """Lane, client and job."""
    new: list[Sequence] = field(default_factory=list)
    joining: list[Sequence] = field(default_factory=list)
    """Those that get a place in the client's line: new ones, and ones that wait in others' lines alone."""


class InFlight:
    """Batches that the runner has: those on the device, and those behind, of which interactive ones go first."""

    def __init__(self) -> None:
        self._numbers = count()
        self._behind: dict[Lane, dict[int, float]] = {lane: {} for lane in Lane}
        """The expected seconds of each, in order."""
        self._first: int | None = None
        """The one on the device longest; None: it does nothing."""
        self._ends = 0.0
        """When that one will, as expected."""

    def begin(self, lane: Lane, seconds: float, now: float) -> int:
        """A batch is given to the runner; returns its number for `end`."""
        batch = next(self._numbers)
        if self._first is None:
            self._first, self._ends = batch, now + seconds
        else:
            self._behind[lane][batch] = seconds
        return batch

    def end(self, batch: int, now: float) -> None:
        """A batch is answered. Where it was on the device the next one takes its place; others may overtake that."""
        if batch is not self._first:
            for behind in self._behind.values():
                behind.pop(batch, None)
            return
        self._first = None
        following = next((behind for behind in self._behind.values() if behind), None)
        if following is not None:
            self._first = next(iter(following))
            self._ends = now + following.pop(self._first)

    def rest(self, now: float) -> float:
        """Seconds until the one on the device ends; 0.0 where it does nothing."""
        return 0.0 if self._first is None else max(0.0, self._ends - now)

    def has_room(self, *, full: bool, interactive: bool) -> bool:
        """Whether to cut a batch now: as late as possible, for what arrives meanwhile still gets into it.

        An idle device takes anything. Behind a busy one goes a batch that is `full`, which gains nothing by waiting;
        and behind bulk alone one with `interactive` texts, to overtake it.
        """
        if self._first is None:
            return True
        if not any(self._behind.values()):
            return full
        return interactive and not self._behind[Lane.INTERACTIVE]
