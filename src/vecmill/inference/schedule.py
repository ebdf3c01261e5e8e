"""From a request's rows to the model's vectors for them: their lane, the scheduler, and waiting for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter

from vecmill.core.errors import DeadlineExceeded, DoesNotFit, InputTooLong, InvalidInput, NonFiniteEmbedding
from vecmill.core.types import Caller, Lane, ModelCard, Timings, Vector
from vecmill.inference.cache_lookup import CachedRow
from vecmill.inference.text_tokenizer import Tokenized
from vecmill.scheduler.lines import Keep, SequenceResult
from vecmill.scheduler.scheduler import Scheduler

LONGEST_TIMEOUT = 86_400.0  # seconds; what asyncio's clocks take without overflow, and nobody waits longer
# A person's search has no more texts and tokens than these, with room to spare; an indexer's batches are larger.
FEW_TEXTS = 8
FEW_TOKENS = 512
CHARACTERS_PER_TOKEN = 4  # about, for texts that are not tokenized yet


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a request is to be run, and since when."""

    caller: Caller
    interactive_hint: bool
    """Queries and reranking: somebody probably waits for the answer."""
    truncate: bool
    """Whether a text that is too long may be cut, AUTO_TRUNCATE included."""
    arrived: float
    """By `perf_counter`, as the next."""
    admitted: float
    deadline: float
    """By `monotonic`."""
    partition: str = ""
    """Equal texts of requests in different partitions are not run as one."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """A request's inputs, tokenized or found in the cache, in the order of the request."""

    inputs: Sequence[Tokenized | CachedRow]
    name: Callable[[int], str]
    """What the client calls the input at an index, for error texts."""

    @property
    def new(self) -> dict[int, Tokenized]:
        """Those that have to be run, by index."""
        return {index: row for index, row in enumerate(self.inputs) if isinstance(row, Tokenized)}


@dataclass(frozen=True, slots=True)
class RowResults:
    """What the model gave for each row, and what it cost."""

    vectors: list[Vector]
    """Full width; a reranker's are logits of width 1."""
    tokens: tuple[int, ...]
    """Of each row."""
    cached: tuple[int, ...]
    """Indexes of the rows whose vectors came from the cache."""
    truncated: tuple[int, ...]
    """Indexes of the rows that were cut."""
    timings: Timings
    lane: Lane
    waited: bool
    """Whether other work was ahead of it."""
    reported_hits: tuple[int, ...]
    """Those of `cached` that the client may be told of."""

    @property
    def prompt_tokens(self) -> int:
        """Of all rows."""
        return sum(self.tokens)

    @property
    def cached_tokens(self) -> int:
        """Of the rows that were not run."""
        return sum(self.tokens[index] for index in self.cached)

    @property
    def reported_hit_tokens(self) -> int:
        """Of the rows that were not run and that the client may be told of."""
        return sum(self.tokens[index] for index in self.reported_hits)

    @property
    def nbytes(self) -> int:
        """Size of all vectors."""
        return self.vectors[0].nbytes * len(self.vectors)


@asynccontextmanager
async def within(caller: Caller, longest: float) -> AsyncIterator[float]:
    """Hold the block to the caller's timeout, or to `longest` seconds where that is less; yields the deadline.

    The time counts from the first byte of the request.

    Raises:
        DeadlineExceeded: the time is over.
    """
    seconds = min(longest, LONGEST_TIMEOUT if caller.timeout is None else caller.timeout)
    now = monotonic()
    left = seconds if caller.began is None else caller.began + seconds - now
    try:
        async with asyncio.timeout(left):
            yield now + left
    except TimeoutError:
        raise DeadlineExceeded(
            f"timeout: the request was not answered within {seconds:g} s (X-Request-Timeout, REQUEST_TIMEOUT); its "
            f"remaining texts are not run. Send fewer texts at once, or allow more time."
        ) from None


def expected_lane(caller: Caller, *, interactive_hint: bool, texts: int, estimated_tokens: int) -> Lane:
    """The lane before the texts are tokenized; the estimate counts a token for each character."""
    tokens = estimated_tokens // CHARACTERS_PER_TOKEN
    return choose_lane(caller, interactive_hint=interactive_hint, texts=texts, tokens=tokens)


def choose_lane(caller: Caller, *, interactive_hint: bool, texts: int, tokens: int) -> Lane:
    """The lane that the caller names; else interactive for queries, reranking and a few short texts outside any job."""
    if caller.lane is not None:
        return caller.lane
    small = texts <= FEW_TEXTS and tokens <= FEW_TOKENS
    return Lane.INTERACTIVE if interactive_hint or (small and caller.job_id is None) else Lane.BULK


async def run_rows(
    scheduler: Scheduler,
    card: ModelCard,
    rows: RequestRows,
    options: RunOptions,
    keep: Keep | None = None,
) -> RowResults:
    """Schedule the rows that are not cached, and wait until all of them are run or one fails.

    `keep` is given each new vector that has a key.

    Raises:
        InvalidInput: a text must not be cut, or nothing of it would be left. Unavailable: it could not be run.
    """
    new = rows.new
    _check_runnable(card, new, rows, options)
    tokens = tuple([row.tokens for row in rows.inputs])
    hint = options.interactive_hint
    lane = choose_lane(options.caller, interactive_hint=hint, texts=len(tokens), tokens=sum(tokens))
    submitted = perf_counter()
    waited = bool(new) and scheduler.busy
    results: list[SequenceResult] = []
    if new:
        caller = options.caller
        futures = scheduler.submit(
            card.key,
            [row.row for row in new.values()],
            lane=lane,
            client=caller.client,
            job=caller.job_id or "",
            partition=options.partition,
            deadline=options.deadline,
            keep=keep,
            keys=[row.key for row in new.values()],
        )
        results = await _all_or_first_error(futures, list(new), rows.name)
    # A row that joined an equal one may have been queued before this request came: only the time since then counts.
    queue = min([result.queue_seconds for result in results], default=0.0)
    queue = min(queue, perf_counter() - submitted)
    forward = perf_counter() - submitted - queue
    computed = iter(results)
    cached = tuple([index for index, row in enumerate(rows.inputs) if isinstance(row, CachedRow)])
    return RowResults(
        vectors=[row.vector if isinstance(row, CachedRow) else next(computed).vector for row in rows.inputs],
        tokens=tokens,
        cached=cached,
        truncated=tuple([index for index, row in enumerate(rows.inputs) if row.truncated]),
        timings=Timings(submitted - options.admitted, queue + options.admitted - options.arrived, forward),
        lane=lane,
        waited=waited,
        reported_hits=cached,
    )


async def _all_or_first_error(
    futures: Sequence[asyncio.Future[SequenceResult]], indexes: Sequence[int], name: Callable[[int], str]
) -> list[SequenceResult]:
    """Wait for every future, in order: rows are run in it. On the first error, or when the caller is cancelled, the
    rest is abandoned.

    Raises:
        NonFiniteEmbedding, DoesNotFit: with the `name` of the input. Any other error as it was set.
    """
    results: list[SequenceResult] = []
    try:
        # One after the other: what waits for all of them at once is called back for each.
        for future in futures:
            results.append(await future)
        return results
    except (NonFiniteEmbedding, DoesNotFit) as error:
        failed = name(indexes[len(results)])
        raise type(error)(f"`{failed}`: {error.message}", param=failed) from None
    finally:
        for future in futures[len(results) :]:
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen: asyncio would log an error that nobody looked at


def _check_runnable(card: ModelCard, new: Mapping[int, Tokenized], rows: RequestRows, options: RunOptions) -> None:
    """Refuse rows that cannot be run.

    Raises:
        InputTooLong: a text is too long and must not be cut.
        InvalidInput: a text has no tokens, or none that is pooled, so that there is no mean.
    """
    too_long = next((index for index, row in new.items() if row.too_long), None)
    if too_long is not None and not options.truncate:
        raise _too_long(card, new[too_long], rows.name(too_long))
    for index, row in new.items():
        if len(row.row) > row.row.unpooled:
            continue
        name = rows.name(index)
        if not len(row.row):
            raise InvalidInput(
                f"`{name}`: the model's tokenizer gives no tokens for this text (with reranking, nor for its query); "
                f"send another text.",
                param=name,
            )
        raise InvalidInput(
            f"`{name}`: the instruction alone fills the model's maximum context length, nothing of the "
            f"text is left; shorten the instruction or raise MAX_MODEL_LEN."
            if row.truncated
            else f"`{name}`: it has no tokens beside the prompt's, which the model does not pool; send another text.",
            param=name,
        )


def _too_long(card: ModelCard, row: Tokenized, name: str) -> InputTooLong:
    """In OpenAI's words: clients look for them to split a text in two."""
    limit = len(row.row)
    whose = "This model's" if limit >= card.max_model_len else "Your request's"
    return InputTooLong(
        f"{whose} maximum context length is {limit} tokens, however `{name}` has at least "
        f"{row.total}. Shorten it, or let it be truncated (`truncate`, AUTO_TRUNCATE).",
        param=name,
    )
