"""From a request's rows to the model's answers for them, by way of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter

from vecmill.core.errors import DeadlineExceeded, InputTooLong, InvalidInput
from vecmill.core.types import Caller, Lane, ModelCard, Timings, Vector
from vecmill.inference.gather import all_or_first_error
from vecmill.inference.lane import choose_lane
from vecmill.inference.recall import Recalled
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
    came: float
    """By `perf_counter`, as the next."""
    started: float
    """When it was admitted."""
    deadline: float
    """By `monotonic`."""
    apart: str = ""
    """Equal texts of requests that have another one here are run again."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What the model gave for each row, and what it cost."""

    rows: list[Vector]
    """Full-width vectors, or logits of width 1."""
    tokens: tuple[int, ...]
    """Of each row."""
    cached: tuple[int, ...]
    """Indexes of the rows that were not run: their vectors were kept."""
    truncated: tuple[int, ...]
    timings: Timings
    lane: Lane
    waited: bool
    told: tuple[int, ...]
    """Those of `cached` that the client is told of."""

    @property
    def prompt_tokens(self) -> int:
        """Of all rows."""
        return sum(self.tokens)

    @property
    def cached_tokens(self) -> int:
        """Of those that were not run."""
        return sum(self.tokens[index] for index in self.cached)

    @property
    def told_tokens(self) -> int:
        """Of those that were not run and that the client is told of."""
        return sum(self.tokens[index] for index in self.told)


Keep = Callable[[bytes, Vector], None]


@asynccontextmanager
async def within(caller: Caller, longest: float) -> AsyncIterator[float]:
    """Hold the block to the caller's timeout, or to `longest` seconds where that is less; gives the deadline.

    The time counts from the first byte of the request.

    Raises:
        DeadlineExceeded: the time was over before the block.
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


async def run_rows(
    scheduler: Scheduler,
    model: ServedEmbedder | ServedReranker,
    inputs: Sequence[Tokenized | Recalled],
    asked: Asked,
    name: Callable[[int], str],
    keep: Keep | None = None,
) -> Ran:
    """Schedule all rows and wait for all of them or for the first that fails.

    `name` is for error texts; `keep` is given the vector of each row that has a key.

    Raises:
        InvalidInput: a text must not be cut, or none of it would be left. Unavailable: it could not be run.
    """
    tokens = tuple(one.tokens for one in inputs)
    new = {index: one for index, one in enumerate(inputs) if isinstance(one, Tokenized)}
    too_long = next((index for index, one in new.items() if one.too_long), None)
    if too_long is not None and not asked.truncate:
        raise _too_long(model.card, new[too_long], name(too_long))
    _check_pooled(new, name)
    submitted = perf_counter()
    waited = bool(new) and scheduler.busy
    lane = choose_lane(asked.caller, is_query=asked.is_query, texts=len(inputs), tokens=sum(tokens))
    vectors, queue = await _run_new(scheduler, model, new, asked, name, lane, keep)
    # Of an equal text that was queued before this request, only the part since then is this request's wait.
    queue = min(queue, perf_counter() - submitted)
    infer = perf_counter() - submitted - queue
    cached = tuple(index for index, one in enumerate(inputs) if isinstance(one, Recalled))
    return Ran(
        rows=[one.vector if isinstance(one, Recalled) else vectors[index] for index, one in enumerate(inputs)],
        tokens=tokens,
        cached=cached,
        truncated=tuple(index for index, one in enumerate(inputs) if one.truncated),
        timings=Timings(submitted - asked.started, queue + asked.started - asked.came, infer),
        lane=lane,
        waited=waited,
        told=cached,
    )


async def _run_new(
    scheduler: Scheduler,
    model: ServedEmbedder | ServedReranker,
    new: Mapping[int, Tokenized],
    asked: Asked,
    name: Callable[[int], str],
    lane: Lane,
    keep: Keep | None,
) -> tuple[Mapping[int, Vector], float]:
    """The vectors by index, and the seconds until the first was run."""
    if not new:
        return {}, 0.0
    indexes = list(new)
    futures = scheduler.submit(
        model.key,
        (one.row for one in new.values()),
        lane=lane,
        client=asked.caller.client,
        job=asked.caller.job_id or "",
        apart=asked.apart,
        deadline=asked.deadline,
        keep=(partial(keep, one.key) if keep is not None and one.key is not None else None for one in new.values()),
    )
    results = await all_or_first_error(futures, lambda place: name(indexes[place]))
    vectors = {index: result.vector for index, result in zip(indexes, results, strict=True)}
    return vectors, min(result.queue_seconds for result in results)


def _too_long(card: ModelCard, tokenized: Tokenized, name: str) -> InputTooLong:
    """In OpenAI's words: clients look for them to split a text in two."""
    limit = len(tokenized.row)
    whose = "This model's" if limit >= card.max_model_len else "Your request's"
    return InputTooLong(
        f"{whose} maximum context length is {limit} tokens, however `{name}` has at least "
        f"{tokenized.total}. Shorten it, or let it be truncated (`truncate`, AUTO_TRUNCATE).",
        param=name,
    )


def _check_pooled(tokenized: Mapping[int, Tokenized], name: Callable[[int], str]) -> None:
    """Refuse a text without tokens, and one that was cut before its first token that counts: there would be nothing to
    take the mean of.

    Raises:
        InvalidInput: there are no tokens, or the instruction fills the model's length.
    """
    for index, one in tokenized.items():
        if not len(one.row):
            raise InvalidInput(
                f"`{name(index)}`: the model's tokenizer makes no tokens of it, and adds none: it is empty, "
                f"or as good as empty (and so is the query, of a document that is ranked); send another text.",
                param=name(index),
            )
        if one.row.unpooled >= len(one.row):
            raise InvalidInput(
                f"`{name(index)}`: the instruction alone fills the model's maximum context length, nothing of the "
                f"text is left; shorten the instruction or raise MAX_MODEL_LEN."
                if one.truncated
                else f"`{name(index)}`: it has no tokens beside the prompt's, which the model does not pool; send "
                f"another text.",
                param=name(index),
            )
