"""From a request's rows to the model's answers for them, by way of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter

from vecmill.core.errors import DeadlineExceeded, InputTooLong, InvalidInput
from vecmill.core.types import Caller, Lane, ModelCard, Timings, Vector
from vecmill.inference.gather import all_or_first_error
from vecmill.inference.lane import choose_lane
from vecmill.inference.served import ServedEmbedder, ServedReranker
from vecmill.inference.tokenization import Tokenized
from vecmill.scheduler.scheduler import Scheduler

LONGEST_TIMEOUT = 86_400.0  # seconds; what asyncio's clocks take without overflow, and nobody waits longer


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request says of how it is to be run."""

    caller: Caller
    is_query: bool
    """A person seems to wait for it."""
    truncate: bool
    started: float
    """By `perf_counter`."""
    deadline: float
    """By `monotonic`."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What the model gave for each row, and what it cost."""

    rows: list[Vector]
    """Full-width vectors, or logits of width 1."""
    prompt_tokens: int
    truncated: tuple[int, ...]
    timings: Timings
    lane: Lane
    waited: bool


@asynccontextmanager
async def within(caller: Caller, longest: float) -> AsyncIterator[float]:
    """Hold the block to the caller's timeout, or to `longest` seconds where that is less; gives the deadline.

    Raises:
        DeadlineExceeded: the time was over before the block.
    """
    seconds = min(longest, LONGEST_TIMEOUT if caller.timeout is None else caller.timeout)
    try:
        async with asyncio.timeout(seconds):
            yield monotonic() + seconds
    except TimeoutError:
        raise DeadlineExceeded(
            f"timeout: the request was not answered within {seconds:g} s (X-Request-Timeout, REQUEST_TIMEOUT); its "
            f"remaining texts are not run. Send fewer texts at once, or allow more time."
        ) from None


async def run_rows(
    scheduler: Scheduler,
    model: ServedEmbedder | ServedReranker,
    tokenized: Sequence[Tokenized],
    tokens: int,
    asked: Asked,
    name: Callable[[int], str],
) -> Ran:
    """Schedule all rows, of so many tokens, and wait for all of them or for the first that fails.

    `name` is for error texts.

    Raises:
        InvalidInput: a text must not be cut, or none of it would be left. Unavailable: it could not be run.
    """
    truncated = tuple(index for index, one in enumerate(tokenized) if one.truncated)
    too_long = next((index for index, one in enumerate(tokenized) if one.too_long), None)
    if too_long is not None and not asked.truncate:
        raise _too_long(model.card, tokenized[too_long], name(too_long))
    _check_pooled(tokenized, name)
    submitted = perf_counter()
    waited = scheduler.busy
    lane = choose_lane(asked.caller, is_query=asked.is_query, texts=len(tokenized), tokens=tokens)
    futures = scheduler.submit(
        model.key,
        (one.row for one in tokenized),
        lane=lane,
        client=asked.caller.client,
        deadline=asked.deadline,
    )
    results = await all_or_first_error(futures, name)
    queue = min(result.queue_seconds for result in results)
    # Of an equal text that was queued before this request, only the part since then is this request's wait.
    queue = min(queue, perf_counter() - submitted)
    return Ran(
        rows=[result.vector for result in results],
        prompt_tokens=tokens,
        truncated=truncated,
        timings=Timings(submitted - asked.started, queue, perf_counter() - submitted - queue),
        lane=lane,
        waited=waited,
    )


def _too_long(card: ModelCard, tokenized: Tokenized, name: str) -> InputTooLong:
    """In OpenAI's words: clients look for them to split a text in two."""
    limit = len(tokenized.row)
    whose = "This model's" if limit >= card.max_model_len else "Your request's"
    return InputTooLong(
        f"{whose} maximum context length is {limit} tokens, however `{name}` has at least "
        f"{tokenized.total}. Shorten it, or let it be truncated (`truncate`, AUTO_TRUNCATE).",
        param=name,
    )


def _check_pooled(tokenized: Iterable[Tokenized], name: Callable[[int], str]) -> None:
    """Refuse a text that was cut before its first token that counts: there would be nothing to take the mean of.

    Raises:
        InvalidInput: the instruction fills the model's length.
    """
    for index, one in enumerate(tokenized):
        if one.row.unpooled >= len(one.row):
            raise InvalidInput(
                f"`{name(index)}`: the instruction alone fills the model's maximum context length, nothing of the "
                f"text is left; shorten the instruction or raise MAX_MODEL_LEN.",
                param=name(index),
            )
