"""What loading and warm-up give the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecmill.core.calibration import Warmed
from vecmill.core.types import Lane, ModelCard
from vecmill.engine.cuda_graphs import Graphs
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, PackedBatch, PrefixMemory
from vecmill.models.tokenizer_files import ReadTokenizer

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

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self.single_up_to = 0
        """Tokens of the largest pass that gets one thread."""

    def set_for(self, tokens: int) -> None:
        """Before a pass of so many tokens."""
        wanted = 1 if tokens <= self.single_up_to else self._all
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def restore(self) -> None:
        """All threads again, for whoever comes next."""
        torch.set_num_threads(self._all)

    def measure(self, run: Callable[[int], float], largest: int) -> None:
        """Choose, by the seconds that `run` takes for so many tokens with one thread and with all."""
        if self._all == 1:
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
