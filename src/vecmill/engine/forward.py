"""A model on the device, and one batch on it: packed, launched, halved if memory runs out, its answers fetched.

On a CPU a batch of several rows is divided into passes that run at the same time, each in fewer threads. Threads that
share a pass wait for each other at every layer and every small step between, and where the system is slow to wake them
that costs half of the time; passes of their own do not. A thread that is done with its part of a batch goes on with the
next batch's, those of interactive batches first. Between two layers of bulk a pass of an interactive batch may run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vecmill.core.errors import DoesNotFit, NonFiniteEmbedding, OutOfMemory, VecmillError
from vecmill.core.threads import SharedThreads, give_way
from vecmill.core.types import Lane, ModelCard, Row, Vector
from vecmill.engine.compilation import CompileChoice
from vecmill.engine.cuda_graphs import Graphs, lane_of, whole_row
from vecmill.engine.device import unless_out_of_memory
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.cpu_kernels import torch_threads
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


# Of passes that run at the same time. Each reads all weights, and its steps are run by one interpreter: with fewer
# tokens that would be what takes the time.
FEWEST_TOKENS_OF_A_PART = 128
# So many times its share of the tokens may the largest part have, or the batch is not divided: the others would be done
# long before it.
LARGEST_OVER_SHARE = 1.25


class CpuThreads:
    """How a model's batches are shared out among a CPU's threads: one for small passes; otherwise all of them, in
    several passes at a time where the rows can be divided.
    """

    def __init__(self, everything: int | None = None, *, fixed: bool = False, divides: bool = True) -> None:
        """`everything`: the number that all are; left out, as many as this thread has now. `fixed`: every pass gets
        all of them, since the last bits depend on their number. `divides`: not where layers are compiled, which is done
        for one number of threads and anew at the first pass of any other.
        """
        self._all = everything or torch.get_num_threads()
        self._fixed, self._divides = fixed, divides
        self.single_up_to = 0
        """Tokens of the largest pass that gets one thread."""

    def of_pass(self, tokens: int, at_once: int = 1) -> int:
        """How many a pass of `tokens` tokens gets, one of `at_once` of a batch."""
        return 1 if tokens <= self.single_up_to and not self._fixed else max(1, self._all // at_once)

    def given(self, tokens: int, at_once: int = 1) -> AbstractContextManager[None]:
        """The calling thread has as many as such a pass gets, within the block."""
        return torch_threads(self.of_pass(tokens, at_once))

    def divided(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of these lengths as passes that run at the same time: the indexes of each, in order."""
        tokens = sum(lengths)
        most = min(self._all, len(lengths), tokens // FEWEST_TOKENS_OF_A_PART)
        if most < 2 or tokens <= self.single_up_to or not self._divides:
            return [list(range(len(lengths)))]
        count = max(number for number in range(1, most + 1) if self._all % number == 0)
        parts: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            smallest = sizes.index(min(sizes))
            parts[smallest].append(index)
            sizes[smallest] += lengths[index]
        if max(sizes) > LARGEST_OVER_SHARE * tokens / count:
            return [list(range(len(lengths)))]
        return [sorted(part) for part in parts]

    def measure(
        self,
        run: Callable[[int], float],
        largest: int,
        tried: Sequence[int] = SINGLE_THREAD_TRIED,
        runs: int = SINGLE_THREAD_RUNS,
    ) -> None:
        """Choose, by the seconds that `run` takes for so many tokens with one thread and with all: for each size that
        is `tried`, the smallest first, as far as `largest`, the fastest of so many `runs`.
        """
        if self._all == 1 or self._fixed:
            return
        chosen = 0
        for tokens in tried:
            if tokens > largest:
                break
            single, several = (self._fastest(run, tokens, runs, single=single) for single in (True, False))
            if single > ONE_THREAD_SLOWDOWN_ALLOWED * several:
                break
            chosen = tokens
        self.single_up_to = chosen

    def _fastest(self, run: Callable[[int], float], tokens: int, runs: int, *, single: bool) -> float:
        self.single_up_to = tokens if single else 0
        return min(run(tokens) for _ in range(runs))


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
    passes: SharedThreads | None = None
    """On a CPU: what runs the passes."""

    @classmethod
    def of(cls, device: torch.device, threads: int) -> Device:
        """A device on which nothing runs yet. `threads`: all that passes may have on a CPU."""
        if device.type == "cuda":
            return cls(device, Streams.on(device))
        return cls(device, None, SharedThreads(threads, "pass") if device.type == "cpu" else None)

    def close(self) -> None:
        """End its threads, after what they have been given."""
        if self.passes is not None:
            self.passes.shutdown()

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

    def forward(self, packed: PackedBatch, at_once: int = 1) -> Tensor:
        """(N, width) float32, not normalised, in packed order. Belongs to the thread that owns the device, and on a CPU
        to those for passes. `at_once`: passes that its batch is divided into on a CPU.
        """
        if packed.shape is not None:
            return self.graphs.run(packed)
        if packed.input_ids.is_cuda:
            return self.model.forward(packed)
        with self.threads.given(packed.input_ids.shape[1], at_once):
            return self.model.forward(packed)

    @property
    def key(self) -> str:
        """What scheduler and engine call it."""
        return self.card.key


@dataclass(frozen=True, slots=True)
class Packed:
    """What runs in one forward pass: rows on the device, or on their way there."""

    indexes: Sequence[int]
    """The batch's rows."""
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

    @property
    def tokens(self) -> int:
        """Of its pack."""
        return self.packed.input_ids.shape[1]


class Launched:
    """A batch on its way."""

    def __init__(self, model: LoadedModel, rows: Sequence[Row], device: Device, lane: Lane) -> None:
        self._model, self._device, self._lane = model, device, lane
        self.rows = rows
        self.running: list[tuple[Sequence[int], Future[LaunchedPart | None]]] = []
        """Passes in a CPU's threads that nobody has waited for, and the rows of each."""
        self.parts: list[LaunchedPart] = []
        self.refused: dict[int, VecmillError] = {}
        """Why rows have no vector that memory did not hold even alone, by their places."""
        self.splits = 0
        self._together = 0
        """Tokens of the parts that ran at the same time and fitted."""

    def run(self, indexes: Sequence[int], ready: Packed | None = None, at_once: int = 1) -> LaunchedPart:
        """Run a pass of these rows; see `run_part`."""
        return run_part(self._model, self.rows, self._device, self._lane, indexes, ready, at_once)

    def add(self, indexes: Sequence[int], part: LaunchedPart | None) -> None:
        """Take in what a pass of these rows gave; where it did not fit into the memory, run its halves."""
        if part is not None:
            self.parts.append(part)
            return
        logger.warning("out of memory on a forward pass of %d rows", len(indexes))
        if len(indexes) == 1:
            self.refused[indexes[0]] = _refusal(self._model, self.rows[indexes[0]], self._device)
            return
        self.splits += 1
        middle = len(indexes) // 2
        for half in (indexes[:middle], indexes[middle:]):
            self.add(half, unless_out_of_memory(partial(self.run, half)))

    def then(self, function: Callable[[], None]) -> None:
        """Call once the passes in a CPU's threads have ended: in the thread of the last one that ends, or here."""
        left = len(self.running)
        lock = threading.Lock()

        def ended(_: object) -> None:
            nonlocal left
            with lock:
                left -= 1
                if left:
                    return
            function()

        for _, each in list(self.running):  # `finish`, which the function may call, clears the list
            each.add_done_callback(ended)

    @property
    def is_lost(self) -> bool:
        """Whether a pass that has ended raised, or its thread ended."""
        return any(each.done() and each.exception() is not None for _, each in self.running)

    def finish(self) -> None:
        """Wait for the passes in a CPU's threads.

        Raises:
            Exception: what the first that failed raised, once all have ended.
        """
        wait([each for _, each in self.running])
        ran = [(indexes, each.result()) for indexes, each in self.running]
        self.running.clear()
        if not self._model.alone:
            self._together += sum(part.tokens for _, part in ran if part is not None)
        for indexes, part in ran:
            self.add(indexes, part)

    @property
    def fitting_tokens(self) -> int:
        """Tokens that fitted at a time: of the parts that ran together, or of the largest that ran by itself."""
        return max([self._together, *(part.tokens for part in self.parts)])


def give_way_between(layers: Sequence[nn.Module]) -> None:
    """Before each layer of a pass of bulk on a CPU, let one pass of an interactive batch run first.

    It is a forward pre-hook. Compiled layers do not call it: torch calls what was compiled in place of hooks and layer.
    """
    for layer in layers:
        if _give_way not in layer._forward_pre_hooks.values():  # models may share it
            layer.register_forward_pre_hook(_give_way)


def _give_way(layer: nn.Module, arguments: object) -> None:
    give_way()


def parts_of(device: Device, model: LoadedModel, rows: Sequence[Row]) -> list[Sequence[int]]:
    """The indexes of the rows of each forward pass that a batch is run in."""
    if model.alone:
        return [range(index, index + 1) for index in range(len(rows))]
    # A prefix that rows share would have to be computed in each part.
    if device.passes is None or have_prefix(rows):
        return [range(len(rows))]
    return list(model.threads.divided([len(row) for row in rows]))


def have_prefix(rows: Sequence[Row]) -> bool:
    """Whether any of the rows begins with a shared prefix."""
    return any(row.prefix is not None for row in rows)


def runs_by_itself(device: Device, rows: Sequence[Row]) -> bool:
    """Whether nothing may be launched while a batch runs.

    There are no threads for its passes, or its shared prefix has to be in the memory of prefixes before the next batch
    is packed.
    """
    return device.streams is None and (device.passes is None or have_prefix(rows))


def pack_on(device: Device, model: LoadedModel, rows: Sequence[Row]) -> list[Packed]:
    """Pack each part of a batch; see `pack_part`."""
    return [pack_part(device, model, rows, indexes) for indexes in parts_of(device, model, rows)]


def pack_part(device: Device, model: LoadedModel, rows: Sequence[Row], indexes: Sequence[int]) -> Packed:
    """Pack rows in the shape of a graph, where one holds them, and copy them on a stream of its own.

    On the forward pass's stream the copy would wait for the passes before. Rows that share a prefix belong to the
    thread that owns the device, which knows what is in the memory of prefixes.
    """
    own: Sequence[Row] = [rows[index] for index in indexes]
    # Alone, a row may not depend on whether its prefix was computed before.
    own = [whole_row(row) for row in own] if model.alone else model.graphs.whole_rows(own) or own
    shape = model.graphs.shape_for(own)
    memory = model.prefixes if have_prefix(own) else None
    if device.streams is None:
        return Packed(indexes, pack(own, device.device, memory, shape, model.attention), None)
    with torch.cuda.stream(device.streams.copies):
        packed = pack(own, device.device, memory, shape, model.attention)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(device.streams.copies)
    return Packed(indexes, packed, copied)


def launch(
    model: LoadedModel,
    rows: Sequence[Row],
    device: Device,
    lane: Lane = Lane.BULK,
    packed: Sequence[Packed] | None = None,
    *,
    halves: bool = True,
) -> Launched:
    """Run a batch; on CUDA, put it on the stream; on a CPU, hand its passes to the threads, which hand what they raise
    to `collect`.

    Args:
        packed: what `pack_on` made of it, where that is done already.
        halves: whether a pass that does not fit into the memory is run in halves.

    Raises:
        Exception: what the forward pass raised, with `halves` unless it was for lack of memory.
    """
    parts: Sequence[tuple[Sequence[int], Packed | None]] = (
        [(each.indexes, each) for each in packed]
        if packed is not None
        else [(indexes, None) for indexes in parts_of(device, model, rows)]
    )
    launched = Launched(model, rows, device, lane)
    at_once = 1 if model.alone else len(parts)
    for indexes, ready in parts:
        run: Callable[[], LaunchedPart | None] = partial(launched.run, indexes, ready, at_once)
        if halves:
            run = partial(unless_out_of_memory, run)
        if device.passes is None:
            launched.add(indexes, run())
            continue
        width = model.threads.of_pass(sum(len(rows[index]) for index in indexes), at_once)
        launched.running.append((indexes, device.passes.submit(run, width, urgent=lane is Lane.INTERACTIVE)))
    return launched


def _refusal(model: LoadedModel, row: Row, device: Device) -> VecmillError:
    """Why a row has no vector that memory did not hold alone: it is too long, unless not even one token fits now."""
    least = Row(np.zeros(1, dtype=np.int32))
    if len(row) == 1 or unless_out_of_memory(partial(run_part, model, [least], device, Lane.BULK, range(1))) is None:
        return OutOfMemory()
    return DoesNotFit(f"its {len(row)} tokens do not fit into the device's memory by themselves; shorten it.")


@torch.inference_mode()
def run_part(
    model: LoadedModel,
    rows: Sequence[Row],
    device: Device,
    lane: Lane,
    indexes: Sequence[int],
    ready: Packed | None = None,
    at_once: int = 1,
) -> LaunchedPart:
    """One forward pass; on CUDA it is put on the stream.

    Args:
        ready: of exactly these rows, where they are packed already.
        at_once: passes that the batch is divided into on a CPU.

    Raises:
        Exception: what the forward pass raised.
    """
    ready = ready or pack_part(device, model, rows, indexes)
    packed = ready.batch
    with device.on_stream(lane_of(packed.shape, lane)):
        if ready.copied is not None:
            torch.cuda.current_stream(device.device).wait_event(ready.copied)
        for recalled in packed.recalled:
            recalled.wait()
        answers = model.forward(packed, at_once)
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
    """Wait for the answers: vectors or logits in the order of the rows, an error in place of a row that has none.

    Raises:
        Exception: what a pass in a CPU's threads raised, once all of the batch have ended.
    """
    launched.finish()
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
