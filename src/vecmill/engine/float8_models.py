"""Loading a model with DTYPE=fp8: in bfloat16 first, then rounded, and refused where its answers move too far."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vecmill.core.errors import StartupError
from vecmill.engine.device import describe
from vecmill.hardware.memory import GIGABYTE, MEGABYTE, GpuRoom, host_memory, memory_floor
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.float8 import PRODUCTS, Comparison, in_float8, product_on, to_float8
from vecmill.models.networks import Model, load_model
from vecmill.models.packing import Attention
from vecmill.models.samples import sample_rows
from vecmill.models.tokenizer_files import ReadTokenizer
from vecmill.models.weights import Target

# Of every sample: below, results change places. all-MiniLM-L6-v2, small and so among the worst, gives 0.988.
LEAST_COSINE = 0.98
# Of a reranker's relevance, 0 to 1.
MOST_MOVED = 0.1
NOT_ROUNDED = "DTYPE=fp8 is for linear layers, and this model has none that can be in it"


def can_be_rounded(checkpoint: Checkpoint) -> bool:
    """Whether a model has linear layers for float8: a table of token vectors has none, those with adapters stay."""
    return not checkpoint.network.token_table and checkpoint.adapters is None


def load_in_float8(
    checkpoint: Checkpoint,
    tokenizer: ReadTokenizer,
    target: Target,
    attention: Callable[[Model], Attention],
    room: GpuRoom | None,
    bytes_in_bfloat16: int,
) -> tuple[Model, str]:
    """The model on the target's device, and what is to be said of its type.

    Args:
        attention: what computes a model's attention there.
        room: of the device's memory; None: it is the machine's.

    Raises:
        StartupError: its answers move too far, or the weights in bfloat16 fit nowhere meanwhile.
    """
    device, known = target.device, set(target.shared)
    model = load_model(checkpoint, target.on(loads_on(checkpoint, device, room, bytes_in_bfloat16)))
    try:
        if in_float8(model.layers):
            return model, f"DTYPE=fp8: its layers are those of another model{PRODUCTS[product_on(device)]}"
        comparison = to_float8(model, sample_rows(checkpoint, tokenizer), device, attention(model))
        _check(checkpoint, comparison)
    except BaseException:
        for key in target.shared.keys() - known:
            del target.shared[key]
            target.read.pop(key, None)
        raise
    return model, f"DTYPE=fp8: {comparison.sentence}{PRODUCTS[product_on(device)]}"


def _check(checkpoint: Checkpoint, comparison: Comparison) -> None:
    cure = "set DTYPE to bfloat16"
    if comparison.least_cosine < LEAST_COSINE:
        raise StartupError(
            f"{checkpoint.named}: in fp8 it is not what it is in bfloat16: {comparison.sentence}, and must be at least "
            f"{LEAST_COSINE}: {cure}."
        )
    if comparison.relevance is not None and comparison.relevance > MOST_MOVED:
        raise StartupError(
            f"{checkpoint.named}: in fp8 it is not what it is in bfloat16: {comparison.sentence}, and may by "
            f"{MOST_MOVED}: {cure}."
        )


def loads_on(
    checkpoint: Checkpoint, device: torch.device, room: GpuRoom | None, bytes_in_bfloat16: int
) -> torch.device:
    """Where the weights are in bfloat16: on the device if they fit, else in the machine's memory.

    Raises:
        StartupError: they fit into neither.
    """
    if room is None or (shortage := room.shortage(bytes_in_bfloat16)) is None:
        return device
    meanwhile = f"{checkpoint.named}: its weights are in bfloat16 until they are rounded to fp8"
    if room.unified:
        raise StartupError(f"{meanwhile}, and {shortage}")
    machine = host_memory()
    free = machine.available_mb * MEGABYTE - memory_floor(machine.total_mb * MEGABYTE, None)
    if bytes_in_bfloat16 > free:
        raise StartupError(
            f"{meanwhile}, {bytes_in_bfloat16 / GIGABYTE:.1f} GB that fit neither into the memory of "
            f"{describe(device)} nor into the {max(0, free) / GIGABYTE:.1f} GB that the machine has left: free some, "
            f"or name a smaller model."
        )
    return torch.device("cpu")
