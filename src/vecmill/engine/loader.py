"""From settings to warm models on the device, reporting progress on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.errors import StartupError
from vecmill.core.types import ModelCard, TokenIds
from vecmill.engine.device import choose_device, describe
from vecmill.engine.dtype import choose_dtype, dtype_name, load_fastest
from vecmill.models import checkpoint as checkpoints
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import pack
from vecmill.models.registry import Embedder, family
from vecmill.models.source import find

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]
"""Called with percent done (0..100) and what is being done."""

CUDA_BATCH_TOKENS = 16_384
# Past this a CPU forward only gets longer, not faster, and a query waits behind it.
CPU_BATCH_TOKENS = 2_048
WARMUP_RUNS = 2


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the device."""

    card: ModelCard
    checkpoint: Checkpoint
    embedder: Embedder


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that loading and warm-up found out."""

    device: torch.device
    models: dict[str, LoadedModel]
    max_batch_tokens: int
    warmup_seconds: tuple[float, ...]


def load(models: ModelSettings, engine: EngineSettings, report: Report) -> Loaded:
    """Find, load and warm up every model.

    Raises:
        StartupError: the device, a folder or a weight is not as it must be.
    """
    report(5, "choosing the device")
    device = choose_device(engine.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; the one call that works with every torch
    max_batch_tokens = engine.max_batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else CUDA_BATCH_TOKENS)
    if device.type == "cuda" and "auto" in models.embed_model:
        logger.warning("EMBED_MODEL=auto serves the small bundled model on a GPU: set EMBED_MODEL to one worth it")
    token = models.hf_token.get_secret_value() if models.hf_token else None
    loaded: dict[str, LoadedModel] = {}
    warmup: list[float] = []
    for index, name in enumerate(models.embed_model):
        share = partial(_share, report, index, len(models.embed_model))
        share(0, f"finding {name}")
        checkpoint = checkpoints.read(find(name, token), models.max_model_len)
        if checkpoint.id in loaded:
            raise StartupError(f"EMBED_MODEL names {checkpoint.id} twice; remove one.")
        share(15, f"loading {checkpoint.id}")
        model = _load_one(checkpoint, models.dtype, device)
        share(60, f"warming up {checkpoint.id}")
        warmup += _warm_up(model, engine, max_batch_tokens, device)
        loaded[checkpoint.id] = model
    return Loaded(device, loaded, max_batch_tokens, tuple(warmup))


def _share(report: Report, index: int, count: int, percent: float, message: str) -> None:
    """Progress of one model of several; the first 10 % went to torch and the device."""
    report(10 + 90 * (index + percent / 100) / count, message)


def _load_one(checkpoint: Checkpoint, wanted_dtype: str, device: torch.device) -> LoadedModel:
    build = family(checkpoint)
    chosen = choose_dtype(wanted_dtype, device)
    if chosen is None:
        embedder, chosen = load_fastest(lambda dtype: build(checkpoint, dtype, device))
    else:
        embedder = build(checkpoint, chosen.dtype, device)
    card = ModelCard(
        id=checkpoint.id,
        family=checkpoint.model_type,
        revision=checkpoint.revision,
        dimensions=embedder.dimensions,
        max_model_len=checkpoint.max_model_len,
        vocab_size=embedder.vocab_size,
        pooling=checkpoint.pooling,
        dtype=dtype_name(chosen.dtype),
        dtype_reason=chosen.reason,
        device=describe(device),
        weight_bytes=embedder.weight_bytes,
        prompts=checkpoint.prompts,
    )
    return LoadedModel(card, checkpoint, embedder)


@torch.inference_mode()
def _warm_up(model: LoadedModel, engine: EngineSettings, max_batch_tokens: int, device: torch.device) -> list[float]:
    """Run the largest shape, so that memory does not grow once the server says it is ready. Seconds per run."""
    seconds = []
    for _ in range(WARMUP_RUNS):
        started = perf_counter()
        packed = pack(_largest(model.card, max_batch_tokens, engine.max_batch_size), device)
        model.embedder.forward(packed, use_flash_attn=engine.use_flash_attn).cpu()
        seconds.append(perf_counter() - started)
    return seconds


def _largest(card: ModelCard, max_batch_tokens: int, max_batch_size: int) -> Sequence[TokenIds]:
    length = min(card.max_model_len, max_batch_tokens)
    row = np.arange(length, dtype=np.int32) % card.vocab_size
    return [row] * min(max_batch_size, max(1, max_batch_tokens // length))
