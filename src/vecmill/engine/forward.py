"""One batch on the device: packed, launched, halved where it does not fit into memory, its answers fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vecmill.core.errors import DoesNotFit, NonFiniteEmbedding
from vecmill.core.types import Lane, Row, Vector
from vecmill.engine.cuda_graphs import lane_of
from vecmill.engine.device import unless_out_of_memory
from vecmill.engine.loaded import Device, LoadedModel
from vecmill.models.packing import PackedBatch, pack

logger = logging.getLogger(__name__)


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
    """Kept until the answers are there: what it was copied with belongs to another stream."""
    answers: Tensor  # (len(indexes), width) float32 on the host, in packed order; valid once `done`
    done: torch.cuda.Event | None


@dataclass(slots=True)
class Launched:
    """A batch on its way."""

    rows: Sequence[Row]
    parts: list[LaunchedPart] = field(default_factory=list)
    too_large: list[int] = field(default_factory=list)
    """Rows that do not fit even alone."""
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
    rows = model.graphs.whole_rows(rows) or rows
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
    waiting: list[tuple[Sequence[int], Packed | None]] = [(range(len(rows)), packed)]
    while waiting:
        indexes, ready = waiting.pop(0)
        part = unless_out_of_memory(partial(run_part, model, rows, indexes, device, lane, ready))
        if part is not None:
            launched.parts.append(part)
            continue
        logger.warning("out of memory on a forward pass of %d rows", len(indexes))
        if len(indexes) == 1:
            launched.too_large.extend(indexes)
            continue
        launched.splits += 1
        middle = len(indexes) // 2
        waiting[:0] = [(indexes[:middle], None), (indexes[middle:], None)]
    return launched


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
    for index in launched.too_large:
        results[index] = DoesNotFit(
            f"its {len(launched.rows[index])} tokens do not fit into the device's memory by themselves; shorten it."
        )
    for part in launched.parts:
        if part.done is not None:
            part.done.synchronize()
        _place(part, results)
    return results


def _place(part: LaunchedPart, results: list[Vector | Exception]) -> None:
    vectors = part.answers.numpy()
    finite: Iterable[bool] = np.isfinite(vectors).all(axis=1)
    for position, vector, good in zip(part.packed.order, vectors, finite, strict=True):
        if good:
            results[part.indexes[position]] = vector
