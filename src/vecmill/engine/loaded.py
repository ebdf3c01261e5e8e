"""What loading and warm-up give the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecmill.core.calibration import Warmed
from vecmill.core.types import ModelCard
from vecmill.engine.cpu_threads import CpuThreads
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.packing import PackedBatch
from vecmill.models.prefix_memory import PrefixMemory
from vecmill.models.registry import Model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the device."""

    card: ModelCard
    checkpoint: Checkpoint
    model: Model
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)
    threads: CpuThreads = field(default_factory=CpuThreads)

    def forward(self, packed: PackedBatch, *, use_flash_attn: bool) -> Tensor:
        """(N, width) float32, not normalised, in packed order. Belongs to the thread that owns the device."""
        if not packed.input_ids.is_cuda:
            self.threads.set_for(packed.input_ids.shape[1])
        return self.model.forward(packed, use_flash_attn=use_flash_attn)

    @property
    def key(self) -> str:
        """What scheduler and engine call it."""
        return self.card.key


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that loading and warm-up found out."""

    device: torch.device
    models: dict[str, LoadedModel]
    """By key, in the order of the settings, embedding models first."""
    warmed: dict[str, Warmed]
    """By key."""
    use_flash_attn: bool
    """USE_FLASH_ATTN, where this device has the kernels."""
