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
from vecmill.core.types import Row, Vector
from vecmill.engine.loaded import LoadedModel
from vecmill.engine.out_of_memory import unless_out_of_memory
from vecmill.models.packing import PackedBatch, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
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
    parts: list[Part] = field(default_factory=list)
    too_large: list[int] = field(default_factory=list)
    """Rows that do not fit even alone."""
    splits: int = 0

    @property
    def fitting_tokens(self) -> int:
        """Tokens of the largest part that fitted."""
        return max((part.packed.input_ids.shape[1] for part in self.parts), default=0)


@torch.inference_mode()
def launch(
    model: LoadedModel,
    rows: Sequence[Row],
    device: torch.device,
    *,
    use_flash_attn: bool,
    packed: PackedBatch | None = None,
) -> Launched:
    """Run a batch; on CUDA, put it on the stream. `packed`: of exactly these rows, where that is done already.

    Raises:
        Exception: what the forward pass raised, unless it was for lack of memory.
    """
    launched = Launched(rows)
    waiting: list[tuple[Sequence[int], PackedBatch | None]] = [(range(len(rows)), packed)]
    while waiting:
        indexes, ready = waiting.pop(0)
        part = unless_out_of_memory(partial(_part, model, rows, indexes, device, use_flash_attn, ready))
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


def _part(
    model: LoadedModel,
    rows: Sequence[Row],
    indexes: Sequence[int],
    device: torch.device,
    use_flash_attn: bool,
    ready: PackedBatch | None,
) -> Part:
    """One forward pass."""
    packed = ready or pack([rows[index] for index in indexes], device, model.prefixes)
    answers = model.forward(packed, use_flash_attn=use_flash_attn)
    part = Part(indexes, packed, *_to_host(answers))
    for new in packed.new_prefixes:  # after the pass was launched whole; the stream keeps the order
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


def _place(part: Part, results: list[Vector | Exception]) -> None:
    vectors = part.answers.numpy()
    finite: Iterable[bool] = np.isfinite(vectors).all(axis=1)
    for position, vector, good in zip(part.packed.order, vectors, finite, strict=True):
        if good:
            results[part.indexes[position]] = vector
