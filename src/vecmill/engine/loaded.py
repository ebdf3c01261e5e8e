"""What loading and warm-up give the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecmill.core.calibration import Warmed
from vecmill.core.types import Lane, ModelCard
from vecmill.engine.cpu_threads import CpuThreads
from vecmill.engine.cuda_graphs import Graphs
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PackedBatch, PrefixMemory
from vecmill.models.tokenizer_files import ReadTokenizer


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
class Loaded:
    """Everything that loading and warm-up found out."""

    runs_on: Device
    models: dict[str, LoadedModel]
    """By key, in the order of the settings, embedding models first."""
    warmed: dict[str, Warmed]
    """By key."""

    @property
    def device(self) -> torch.device:
        """That the models are on."""
        return self.runs_on.device
