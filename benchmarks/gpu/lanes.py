"""The cost to bulk of letting interactive work go first: an engine with a stream for each lane, and one without.

Two engines on the same weights, each with bulk alone and with a person's query every now and then beside it, in turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from benchmarks.gpu.proofs import write_checkpoint
from benchmarks.lib.figures import in_turns, spread
from benchmarks.models.shapes import QUICK, QWEN3_0_6B

from vecmill.core.types import Lane, Row
from vecmill.engine.forward import Streams

if TYPE_CHECKING:
    from vecmill.engine.engine import Engine

LANES, ONE_STREAM = "a stream for each lane", "one stream"
QUERY_TOKENS, QUERY_SECONDS = 16, 0.05
WAITING = 4  # batches of bulk: two launched, and the next ones packed
TYPICAL_TEXT = 128  # tokens


def one_stream(device: torch.device) -> Streams:
    """Streams of an engine without that rule: both lanes share one stream and run in the order of their launch."""
    stream = torch.cuda.Stream
    both = stream(device)  # type: ignore[no-untyped-call]
    return Streams(stream(device), dict.fromkeys(Lane, both))  # type: ignore[no-untyped-call]


@dataclass
class Counted:
    """The counts of one round."""

    tokens: int = 0
    """Of bulk work."""
    seconds: float = 0.0
    query_seconds: list[float] = field(default_factory=list)


def lane_cost(
    device: torch.device, keep: Callable[[str, dict[str, Any]], None], *, tiny: bool, rounds: int, seconds: float
) -> None:
    """Bulk's tokens a second with the rule and without, alone and beside a person, and what the person waits."""
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name) / "random-qwen3"
        write_checkpoint(folder, QUICK.encoders["tiny Qwen3"][1] if tiny else QWEN3_0_6B)
        engines = {}
        for way in (LANES, ONE_STREAM):
            changed = patch.object(Streams, "on", one_stream) if way == ONE_STREAM else nullcontext()
            engines[way] = stack.enter_context(_engine(folder, device, changed))
        counts: dict[str, dict[bool, list[Counted]]] = {way: {False: [], True: []} for way in engines}
        for way in in_turns(list(engines), rounds):
            for person in (False, True):
                counts[way][person].append(asyncio.run(_round(engines[way], person, seconds)))
        keep("lanes", summary(counts))


@contextmanager
def _engine(folder: Path, device: torch.device, changed: Any) -> Iterator[Engine]:
    from vecmill.config import load_settings  # what these need may be missing
    from vecmill.engine.engine import Engine

    flags = {"embed_model": str(folder), "rerank_model": "none", "device": device.type}
    settings = load_settings(flags | ({"torch_compile": "false"} if device.type == "cpu" else {}))
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    with changed:
        engine.start()
        engine.loaded.result(120)
    try:
        yield engine
    finally:
        engine.close()


async def _round(engine: Engine, person: bool, seconds: float) -> Counted:
    loaded = engine.loaded.result()
    (key,) = loaded.models
    random = np.random.default_rng(0)
    vocab_size = loaded.models[key].card.vocab_size

    def rows(tokens: int, length: int) -> list[Row]:
        return [Row(random.integers(0, vocab_size, length).astype(np.int32)) for _ in range(max(1, tokens // length))]

    batch = rows(loaded.warmed[key].max_batch_tokens, TYPICAL_TEXT)
    query = rows(QUERY_TOKENS, QUERY_TOKENS)
    counted = Counted()
    ends = perf_counter() + seconds

    async def bulk() -> None:
        while True:
            await engine.run(key, batch, Lane.BULK)
            counted.tokens += sum(map(len, batch))
            if perf_counter() > ends:
                return

    async def ask() -> None:
        while True:
            started = perf_counter()
            await engine.run(key, query, Lane.INTERACTIVE)
            counted.query_seconds.append(perf_counter() - started)
            if perf_counter() > ends:
                return
            await asyncio.sleep(QUERY_SECONDS)

    started = perf_counter()
    await asyncio.gather(*(bulk() for _ in range(WAITING)), *([ask()] if person else []))
    counted.seconds = perf_counter() - started
    return counted


def summary(rounds: Mapping[str, Mapping[bool, list[Counted]]]) -> dict[str, Any]:
    """The rates of both engines, and the share of bulk's tokens that the rule costs, compared round by round."""
    per_second = {
        way: {person: [each.tokens / each.seconds for each in counted] for person, counted in of_way.items()}
        for way, of_way in rounds.items()
    }
    cost = partial(_cost, per_second[LANES], per_second[ONE_STREAM])
    return {
        "ways": {
            way: {
                "bulk_alone_tokens_per_s": spread(rates[False]),
                "bulk_beside_a_person_tokens_per_s": spread(rates[True]),
                "query_ms": _percentiles([1000 * s for counted in rounds[way][True] for s in counted.query_seconds]),
            }
            for way, rates in per_second.items()
        },
        "cost_alone": cost(False),
        "cost_beside_a_person": cost(True),
        "ok": True,
    }


def _cost(lanes: Mapping[bool, list[float]], one_stream: Mapping[bool, list[float]], person: bool) -> dict[str, Any]:
    return spread(
        [1 - with_rule / without for with_rule, without in zip(lanes[person], one_stream[person], strict=True)]
    )


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    return {f"p{share}": round(float(np.percentile(milliseconds, share)), 3) for share in (50, 95)}
