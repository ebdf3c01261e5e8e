"""A model on the device, and one batch on it: packed, launched, halved if memory runs out, its answers fetched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vecmill.core.errors import DoesNotFit, NonFiniteEmbedding, OutOfMemory, VecmillError
from vecmill.core.types import Lane, ModelCard, Row, Vector
from vecmill.engine.compilation import CompileChoice
from vecmill.engine.cuda_graphs import Graphs, lane_of, whole_row
from vecmill.engine.device import unless_out_of_memory
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PackedBatch, PrefixMemory, pack
from vecmill.models.tokenizer_files import ReadTokenizer

logger = logging.getLogger(__name__)

# Tokens of a pass at which one thread is tried, smallest first.
SINGLE_THREAD_TRIED = (16, 32, 64, 128, 256)
# One thread is used unless it takes more than so many times as long: waking idle threads costs time at every step, a
# busy program beside this one makes them late, and cores that are left alone can tokenize and answer.
ONE_THREAD_SLOWDOWN_ALLOWED = 1.4
SINGLE_THREAD_RUNS = 4


class CpuThreads:
    """How many threads a model's forward passes get on a CPU: all of them, or one for small passes.

    Belongs to the thread that owns the device, whose setting it is.
    """

    def __init__(self, everything: int | None = None, *, fixed: bool = False) -> None:
        """`everything`: the number that all are; left out, as many as this thread has now. `fixed`: every pass gets
        all of them, since the last bits depend on their number."""
        self._all = everything or torch.get_num_threads()
        self._fixed = fixed
        self.single_up_to = 0
        """Tokens of the largest pass that gets one thread."""

    def set_for(self, tokens: int) -> None:
        """Set the number of threads for a pass of `tokens` tokens."""
        wanted = 1 if tokens <= self.single_up_to and not self._fixed else self._all
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def restore(self) -> None:
        """Use all threads again."""
        torch.set_num_threads(self._all)

    def measure(self, run: Callable[[int], float], largest: int) -> None:
        """Choose, by the seconds that `run` takes for so many tokens with one thread and with all."""
        if self._all == 1 or self._fixed:
            return
        chosen = 0
        for tokens in SINGLE_THREAD_TRIED:
            if tokens > largest:
                break
            single, several = self._fastest(run, tokens, single=True), self._fastest(run, tokens, single=False)
            if single > ONE_THREAD_SLOWDOWN_ALLOWED * several:
                break
            chosen = tokens
        self.single_up_to = chosen

    def _fastest(self, run: Callable[[int], float], tokens: int, *, single: bool) -> float:
        self.single_up_to = tokens if single else 0
        return min(run(tokens) for _ in range(SINGLE_THREAD_RUNS))


@dataclass(frozen=True, slots=True)
class Streams:
    """The CUDA streams of the engine: batches are copied on one and run on that of their lane."""

    copies: torch.cuda.Stream
    run: Mapping[Lane, torch.cuda.Stream]
    """Interactive work has the higher priority: its kernels go before those of bulk that have not begun."""

    @classmethod
    def on(cls, device: torch.device) -> Streams:
        """New ones."""
        stream = torch.cuda.Stream
        run = {Lane.INTERACTIVE: stream(device, priority=-1), Lane.BULK: stream(device)}  # type: ignore[no-untyped-call]
        return cls(stream(device, priority=-1), run)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Device:
    """Where and how batches run."""

    device: torch.device
    streams: Streams | None
    """None on a CPU."""

    @contextmanager
    def on_stream(self, lane: Lane) -> Iterator[None]:
        """Launch on a lane's stream what is launched in this block."""
        if self.streams is None:
            yield
            return
        with torch.cuda.stream(self.streams.run[lane]):
            yield


@dataclass(slots=True)
class LoadedModel:
    """A model on the device."""

    card: ModelCard
    checkpoint: Checkpoint
    model: Model
    tokenizer: ReadTokenizer
    attention: Attention = Attention.SDPA
    """What its batches are packed for."""
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)
    threads: CpuThreads = field(default_factory=CpuThreads)
    graphs: Graphs = field(default_factory=Graphs)
    """Empty until warm-up has captured them, and on a CPU."""
    choice: CompileChoice | None = None
    """How its layers run; None until warm-up has chosen."""
    alone: bool = False
    """Whether each row runs in a pass of its own, and its bits are the same whatever else is in its batch."""

    def parts_of(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        """The indexes of the rows of each forward pass that a batch is run in."""
        return [range(index, index + 1) for index in range(len(rows))] if self.alone else [range(len(rows))]

    def forward(self, packed: PackedBatch) -> Tensor:
        """(N, width) float32, not normalised, in packed order. Belongs to the thread that owns the device."""
        if packed.shape is not None:
            return self.graphs.run(packed)
        if not packed.input_ids.is_cuda:
            self.threads.set_for(packed.input_ids.shape[1])
        return self.model.forward(packed)

    @property
    def key(self) -> str:
        """What scheduler and engine call it."""
        return self.card.key


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the device, or on its way there."""

    batch: PackedBatch
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class LaunchedPart:
    """What ran in one forward pass."""

    indexes: Sequence[int]
    """The batch's rows."""
    packed: PackedBatch
    """Kept until the answers are there: its memory belongs to the stream of copies, which would reuse it earlier."""
    answers: Tensor  # (len(indexes), width) float32 on the host, in packed order; valid once `done`
    done: torch.cuda.Event | None


@dataclass(slots=True)
class Launched:
    """A batch on its way."""

    rows: Sequence[Row]
    parts: list[LaunchedPart] = field(default_factory=list)
    refused: dict[int, VecmillError] = field(default_factory=dict)
    """Why rows have no vector that memory did not hold even alone, by their places."""
    splits: int = 0

    @property
    def fitting_tokens(self) -> int:
        """Tokens of the largest part that fitted."""
        return max((part.packed.input_ids.shape[1] for part in self.parts), default=0)


def pack_on(device: Device, model: LoadedModel, rows: Sequence[Row]) -> Packed:
    """Pack rows in the shape of a graph, where one holds them, and copy them on a stream of its own.

    On the forward pass's stream the copy would wait for the passes before. Rows that share a prefix belong to the
    thread that owns the device, which knows what is in the memory of prefixes.
    """
    # Alone, a row may not depend on whether its prefix was computed before.
    rows = [whole_row(row) for row in rows] if model.alone else model.graphs.whole_rows(rows) or rows
    shape = model.graphs.shape_for(rows)
    memory = model.prefixes if any(row.prefix is not None for row in rows) else None
    if device.streams is None:
        return Packed(pack(rows, device.device, memory, shape, model.attention), None)
    with torch.cuda.stream(device.streams.copies):
        packed = pack(rows, device.device, memory, shape, model.attention)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(device.streams.copies)
    return Packed(packed, copied)


def launch(
    model: LoadedModel, rows: Sequence[Row], device: Device, lane: Lane = Lane.BULK, packed: Packed | None = None
) -> Launched:
    """Run a batch; on CUDA, put it on the stream. `packed`: of exactly these rows, where that is done already.

    Raises:
        Exception: what the forward pass raised, unless it was for lack of memory.
    """
    launched = Launched(rows)
    waiting = [(indexes, None if model.alone else packed) for indexes in model.parts_of(rows)]
    while waiting:
        indexes, ready = waiting.pop(0)
        part = unless_out_of_memory(partial(run_part, model, rows, indexes, device, lane, ready))
        if part is not None:
            launched.parts.append(part)
            continue
        logger.warning("out of memory on a forward pass of %d rows", len(indexes))
        if len(indexes) == 1:
            launched.refused[indexes[0]] = _refusal(model, rows[indexes[0]], device)
            continue
        launched.splits += 1
        middle = len(indexes) // 2
        waiting[:0] = [(indexes[:middle], None), (indexes[middle:], None)]
    return launched


def _refusal(model: LoadedModel, row: Row, device: Device) -> VecmillError:
    """Why a row has no vector that memory did not hold alone: it is too long, unless not even one token fits now."""
    least = Row(np.zeros(1, dtype=np.int32))
    if (
        len(row) == 1
        or unless_out_of_memory(partial(run_part, model, [least], range(1), device, Lane.BULK, None)) is None
    ):
        return OutOfMemory()
    return DoesNotFit(f"its {len(row)} tokens do not fit into the device's memory by themselves; shorten it.")


@torch.inference_mode()
def run_part(
    model: LoadedModel,
    rows: Sequence[Row],
    indexes: Sequence[int],
    device: Device,
    lane: Lane,
    ready: Packed | None,
) -> LaunchedPart:
    """One forward pass; on CUDA it is put on the stream.

    Raises:
        Exception: what the forward pass raised.
    """
    ready = ready or pack_on(device, model, [rows[index] for index in indexes])
    packed = ready.batch
    with device.on_stream(lane_of(packed.shape, lane)):
        if ready.copied is not None:
            torch.cuda.current_stream(device.device).wait_event(ready.copied)
        for recalled in packed.recalled:
            recalled.wait()
        answers = model.forward(packed)
        part = LaunchedPart(indexes, packed, *_to_host(answers))
    for new in packed.new_prefixes:  # after the pass was launched whole
        new.layers.computed = part.done
        model.prefixes.keep(new.prefix, new.layers)
    return part


def _to_host(answers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """On CUDA the copy is queued behind the forward pass, into pinned memory, and nobody waits for it here."""
    if not answers.is_cuda:
        return answers.cpu(), None
    host = torch.empty(answers.shape, dtype=answers.dtype, pin_memory=True)
    host.copy_(answers, non_blocking=True)
    # Blocking: whoever waits sleeps instead of keeping a core busy. On the answers' device, which need not be the
    # current one.
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(answers.device))
    return host, done


def collect(launched: Launched) -> list[Vector | Exception]:
    """Wait for the answers: vectors or logits in the order of the rows, an error in place of a row that has none."""
    results: list[Vector | Exception] = [NonFiniteEmbedding()] * len(launched.rows)
    for index, refusal in launched.refused.items():
        results[index] = refusal
    for part in launched.parts:
        if part.done is not None:
            part.done.synchronize()
        _place(part, results)
    return results


def _place(part: LaunchedPart, results: list[Vector | Exception]) -> None:
    vectors = part.answers.numpy()
    finite: list[bool] = np.isfinite(vectors).all(axis=1).tolist()
    for position, vector, good in zip(part.packed.order, vectors, finite, strict=True):
        if good:
            results[part.indexes[position]] = vector
