"""A model's whole forward pass as one CUDA graph for each of some shapes.

A short pass on a fast card is bound by the host, which launches some hundred kernels one by one; a graph launches them
all at once. What a graph cannot hold runs directly: rows that share a prefix, rows longer or more than any shape has
room for, attention without flash kernels.

Graphs of few tokens are captured on the stream of interactive work, which has the higher priority, and run there
whoever asks. The others belong to bulk. Graphs of one stream share their memory: they never run at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vecmill.core.errors import first_line
from vecmill.core.types import Lane, Row
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PackedBatch, PackShape, pack

logger = logging.getLogger(__name__)

# Up to here a pass takes a few milliseconds even on a small card: it may go before bulk, whoever asks for it.
INTERACTIVE_TOKENS = 1024
# A row of more tokens runs directly: with a higher bound, every replay would start more blocks that have nothing to do.
LONGEST_ROW = 1024
# Rows of fewer tokens on average run directly, for the same reason; but so many rows are always allowed.
TOKENS_PER_ROW, FEWEST_ROWS = 32, 16
# Tokens at which the gain is measured, smallest first, until there is none.
PROBED_TOKENS = (16, 128, 512, 1024, 2048, 4096, 8192, 16_384)
# A batch is filled up to the next shape, by 6 % on average: below this a graph gains nothing.
LEAST_SPEEDUP = 1.08
# A batch that a shape makes larger by more than this is compared with how long it takes directly.
MOST_FILLED = 1.2
RUNS = 5
CAPTURE_SECONDS = 30.0


def shape_of(tokens: int, max_rows: int) -> PackShape:
    """The shape of a graph of so many tokens, for batches of `max_rows` rows at most."""
    rows = min(max_rows, max(FEWEST_ROWS, tokens // TOKENS_PER_ROW), tokens)
    return PackShape(tokens, rows, min(tokens, LONGEST_ROW))


def ladder(largest: int) -> list[int]:
    """Tokens of the graphs up to `largest`, ascending: steps of 16 at first, then of an eighth at most.

    So few tokens are added to a batch that a graph pays for it, and there are few enough graphs to capture them all.
    """
    sizes = []
    tokens = step = 16
    while tokens <= largest:
        sizes.append(tokens)
        if tokens >= 16 * step:
            step *= 2
        tokens += step
    return sizes


class Pass(Protocol):
    """One captured forward pass."""

    def __call__(self, packed: PackedBatch) -> Tensor:
        """(N, width) float32 of a batch in its shape; overwritten by the next pass on the same stream."""
        ...


Capture = Callable[[PackShape], Pass]


@dataclass(frozen=True, slots=True)
class Gain:
    """What warm-up measured of one shape."""

    tokens: int
    direct_seconds: float
    graph_seconds: float

    @property
    def pays(self) -> bool:
        """Whether the graph is the faster."""
        return self.direct_seconds >= LEAST_SPEEDUP * self.graph_seconds


@dataclass(slots=True)
class Graphs:
    """The graphs of one model, by shape, in ascending order. Belongs to the thread that owns the device."""

    passes: Mapping[PackShape, Pass] = field(default_factory=dict)
    gains: Sequence[Gain] = ()
    memory_bytes: int = 0
    reason: str = ""
    """Why there are none, or not more; one phrase for the log."""

    def shape_for(self, rows: Sequence[Row]) -> PackShape | None:
        """The smallest shape that holds a batch; None where it has to run directly, or ends sooner that way.

        Many short rows may need the room of a shape with far more tokens than they have.
        """
        if not self.passes or any(row.prefix is not None for row in rows):
            return None
        lengths = [len(row) for row in rows]
        shape = next((shape for shape in self.passes if shape.holds(lengths)), None)
        if shape is None or shape.tokens <= MOST_FILLED * sum(lengths) or not self.gains:
            return shape
        direct = next((gain.direct_seconds for gain in self.gains if gain.tokens >= sum(lengths)), float("inf"))
        return shape if self._seconds(shape.tokens) <= direct else None

    def run(self, packed: PackedBatch) -> Tensor:
        """(N, width) float32 of a batch that was packed in one of the shapes, in packed order."""
        assert packed.shape is not None
        return self.passes[packed.shape](packed)[: len(packed.order)]

    def whole_rows(self, rows: Sequence[Row]) -> Sequence[Row] | None:
        """The rows with their prefixes repeated in each, if a graph of those is faster than computing the prefix once.

        None if no row has a prefix, or sharing it is faster.
        """
        if not self.passes or all(row.prefix is None for row in rows):
            return None
        whole = [whole_row(row) for row in rows]
        shape = self.shape_for(whole)
        if shape is None or not self.gains:
            return None
        least = min(gain.direct_seconds for gain in self.gains)  # of a pass without a graph, however few its tokens
        return whole if self._seconds(shape.tokens) <= least else None

    def _seconds(self, tokens: int) -> float:
        """Seconds that a graph for `tokens` takes: those of the smallest measured graph with at least as many."""
        return next((gain.graph_seconds for gain in self.gains if gain.tokens >= tokens), float("inf"))


def whole_row(row: Row) -> Row:
    """The row with its prefix in it."""
    if row.prefix is None:
        return row
    token_ids = np.concatenate((row.prefix.token_ids, row.token_ids))
    return replace(row, token_ids=token_ids, prefix=None)


def lane_of(shape: PackShape | None, lane: Lane) -> Lane:
    """The lane whose stream runs a batch: small graphs run on the interactive one, in whichever lane they were cut."""
    if shape is None:
        return lane
    return Lane.INTERACTIVE if shape.tokens <= INTERACTIVE_TOKENS else Lane.BULK


@torch.inference_mode()
def capture_graphs(
    capture: Capture, run_directly: Callable[[PackedBatch], object], device: torch.device, largest: int, max_rows: int
) -> Graphs:
    """Measure up to how many tokens graphs are faster than launching kernel by kernel, and capture those.

    Largest first within a stream, so that the smaller ones find room in its memory; interactive ones first, so that
    they are there when time or memory ends. What fails leaves what was captured before.
    """
    started, reserved = perf_counter(), _reserved(device)
    graphs = Graphs()
    gains: list[Gain] = []
    passes: dict[PackShape, Pass] = {}
    try:
        for tokens in (tokens for tokens in PROBED_TOKENS if tokens <= largest):
            gains.append(_gain(capture, run_directly, device, shape_of(tokens, max_rows)))
            if not gains[-1].pays:
                break
        top = max((gain.tokens for gain in gains if gain.pays), default=0)
        graphs.reason = f"up to {top} tokens" if top else "no faster than launching kernel by kernel"
        steps = ladder(top)
        small = [tokens for tokens in steps if tokens <= INTERACTIVE_TOKENS]
        for tokens in [*reversed(small), *reversed(steps[len(small) :])]:
            if perf_counter() - started > CAPTURE_SECONDS:
                graphs.reason += f"; those left out for which {CAPTURE_SECONDS:.0f} s were not enough"
                break
            shape = shape_of(tokens, max_rows)
            passes[shape] = capture(shape)
    except Exception as error:  # out of memory above all: what does not fit runs directly
        graphs.reason = f"{type(error).__name__} at {len(passes)} graphs: {first_line(error)[:120]}"
        logger.warning("CUDA graphs: %s", graphs.reason)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    graphs.passes = dict(sorted(passes.items(), key=lambda item: item[0].tokens))
    graphs.gains = tuple(gains)
    graphs.memory_bytes = max(0, _reserved(device) - reserved)
    return graphs


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _gain(
    capture: Capture, run_directly: Callable[[PackedBatch], object], device: torch.device, shape: PackShape
) -> Gain:
    """The fastest of several runs of each, in turns."""
    captured = capture(shape)
    length = min(shape.max_length, max(1, shape.tokens // max(1, shape.rows // 2)))
    rows = [Row(np.zeros(length, dtype=np.int32))] * (shape.tokens // length)
    in_shape = pack(rows, device, shape=shape, attention=Attention.FLASH)
    as_it_is = pack(rows, device, attention=Attention.FLASH)
    direct, graph = [], []
    for _ in range(RUNS):
        direct.append(_seconds(lambda: run_directly(as_it_is), device))
        graph.append(_seconds(lambda: captured(in_shape), device))
    return Gain(shape.tokens, min(direct), min(graph))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


class CudaCapture:
    """Captures passes of one model, each on the stream of its lane."""

    def __init__(self, model: Model, device: torch.device, streams: Mapping[Lane, torch.cuda.Stream]) -> None:
        self._model, self._device, self._streams = model, device, streams
        self._pools: dict[Lane, Any] = {lane: torch.cuda.graph_pool_handle() for lane in streams}
        # A pool may not be used again once the last graph in it is gone, and those that only measure soon are.
        self._anchors = [self._capture(lane, lambda: torch.zeros(1, device=device)) for lane in streams]

    @torch.inference_mode()
    def __call__(self, shape: PackShape) -> CapturedPass:
        """Run the pass once, for what is prepared at the first call, and then capture it."""
        lane = lane_of(shape, Lane.BULK)
        with torch.cuda.stream(self._streams[lane]):
            batch = pack([Row(np.zeros(1, dtype=np.int32))], self._device, shape=shape, attention=Attention.FLASH)
            self._model.forward(batch)
        graph, answers = self._capture(lane, lambda: self._model.forward(batch))
        return CapturedPass(graph, batch.memory, answers)

    def _capture(self, lane: Lane, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Not by torch.cuda.graph, which collects garbage and empties the cache each time."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._streams[lane]):
            # Errors of this thread only: what others ask of the driver meanwhile does no harm.
            graph.capture_begin(pool=self._pools[lane], capture_error_mode="thread_local")
            try:
                answers = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture failed with it
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, answers


@dataclass(frozen=True, slots=True)
class CapturedPass:
    """A graph, where it reads its batch and where it writes its answers."""

    graph: torch.cuda.CUDAGraph
    batch: Tensor  # (bytes,) uint8
    answers: Tensor  # (rows of the shape, width) float32

    def __call__(self, packed: PackedBatch) -> Tensor:
        """On the current stream, which must be the one that it was captured on."""
        self.batch.copy_(packed.memory, non_blocking=True)
        self.graph.replay()
        return self.answers
