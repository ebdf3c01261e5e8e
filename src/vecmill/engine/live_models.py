"""Models that come and go while others are served: read in a thread of its own, warmed up between batches, released.

What is measured of a model at its first load holds for the later ones: its budget, its threads and whether its layers
are compiled. So a model that is loaded again gives the same vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.calibration import Warmed
from vecmill.core.errors import ModelNotFound, StartupError, StartupObstacle, first_line, is_out_of_memory
from vecmill.core.types import ModelCard, Task
from vecmill.engine import loader
from vecmill.engine.compilation import make_eager
from vecmill.engine.cuda_graphs import Graphs
from vecmill.engine.device import (
    CPU_DTYPES,
    ChosenDtype,
    cpu_rates,
    describe,
    dtype_name,
    limit_memory,
    rates_in_words,
)
from vecmill.engine.forward import LoadedModel
from vecmill.engine.loader import Known, Loaded, Report
from vecmill.engine.measurements import Before
from vecmill.engine.sleepers import Copies, Sleepers
from vecmill.engine.warmup import measure_again, warm_up, warm_up_beside_others
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.packing import PrefixMemory
from vecmill.models.rerank_prompt import check_form
from vecmill.models.tokenizer_loading import load_tokenizer

logger = logging.getLogger(__name__)

READING_SHARE = 0.85  # of a load's percents; the rest is warm-up
FASTER = 1.1  # times as fast: what another type of weights has to be, so that it is worth other vectors


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the first load of a model measured, and what it was then."""

    card: ModelCard
    before: Before


class LiveModels:
    """Changes what is loaded. Its calls must not overlap; each says in which thread it belongs."""

    def __init__(self, loaded: Loaded, models: ModelSettings, engine: EngineSettings) -> None:
        self._loaded = loaded
        self._models, self._engine = models, engine
        self._measured: dict[str, _Measured] = {}
        self._of_settings = frozenset(loaded.known)
        self._sleepers = Sleepers(loaded.device, models.sleep_gb, engine.memory_floor_gb)
        self._of_start = set(loaded.to_load)
        for key, model in loaded.models.items():
            self._remember(key, model, loaded.warmed[key])

    def add_cached(self, folder: Path, model_id: str, task: Task | None) -> Known:
        """List a model of the hub's cache, by its folder there. For any thread but the event loop's: it reads files.

        `task`: None leaves it to the model's files.

        Raises:
            StartupError: its files are not those of a model that is read here.
        """
        checkpoint = _read_as(folder, model_id, task) if task is not None else _read_by_itself(folder, model_id)
        checkpoint = loader.capped(checkpoint, self._models.max_model_len)
        card = loader.expected_card(checkpoint, (), self._models, self._loaded.device)
        if card.key not in self._of_settings:  # what the settings name stays as the start has found it
            self._loaded.known[card.key] = Known(checkpoint.source, replace(card, device=self._described))
        return self._loaded.known[card.key]

    @property
    def _described(self) -> str:
        """The device as it was called at the start."""
        return next((known.card.device for known in list(self._loaded.known.values())), describe(self._loaded.device))

    @property
    def asleep(self) -> Mapping[str, int]:
        """Bytes of the machine's memory by sleeping model. For any thread."""
        return self._sleepers.sizes

    def read(self, key: str, report: Report) -> LoadedModel:
        """Put a model's weights on the device, from its files or, if it sleeps, from memory; nobody else knows it yet.

        Belongs to the loading thread.

        Raises:
            StartupError: they cannot be read, or do not fit.
        """
        if key not in self._loaded.known:
            raise ModelNotFound
        known, device, common = self._loaded.known[key], self._loaded.device, self._loaded.common
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # As many as at the start: a new thread has what the device's own had last, and products of weights (NV-Embed's
        # are folded) differ in their last bits.
        torch.set_num_threads(common.threads)
        if (awake := self._woken(key, known, report)) is not None:
            return awake
        checkpoint = read(known.source)
        check_form(checkpoint)
        checkpoint = loader.capped(checkpoint, self._models.max_model_len)
        tokenizer = load_tokenizer(checkpoint)
        loader.recall_dtypes([checkpoint], common, self._models, device)
        loader.check_room([checkpoint], self._models, self._engine, device)
        aliases = {checkpoint.id: tuple(known.card.aliases)}
        try:
            [model] = loader.load_all(
                [(checkpoint, tokenizer)],
                aliases,
                self._models,
                device,
                lambda percent, message: report(READING_SHARE * percent, message),
                flash=self._loaded.flash,
                common=common,
                compiled=self._engine.torch_compile == "true",
                counted=self._counted(),
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise StartupObstacle(
                f"The weights of {checkpoint.id} do not fit into the memory of {describe(device)}: {first_line(error)}"
            ) from None
        model.card = replace(model.card, device=self._described)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what runs them does so on other streams
        return model

    def _counted(self) -> set[int]:
        """Where the weights are that loaded models have."""
        return {
            loader.place_of(tensor)
            for model in self._loaded.models.values()
            for module in model.model.modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    def _woken(self, key: str, known: Known, report: Report) -> LoadedModel | None:
        """A model that slept; None: it did not. Raises StartupError where it has no room."""
        common, device = self._loaded.common, self._loaded.device
        model = self._sleepers.find(key, known.source.folder, common.shared)
        if model is None:
            return None
        report(0, f"waking {known.card.id}")
        room = limit_memory(device, self._engine.memory_fraction, self._engine.memory_floor_gb)
        if room is not None and (shortage := room.shortage(self._sleepers.size(key))) is not None:
            raise StartupError(f"The weights of {known.card.id} do not fit: {shortage}")
        try:
            self._sleepers.wake(key, common.shared)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise StartupObstacle(
                f"The weights of {known.card.id} do not fit into the memory of {describe(device)}: {first_line(error)}"
            ) from None
        model.card = replace(model.card, weight_bytes=loader.uncounted_bytes(model.model, self._counted()))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return model

    def copied(self, model: LoadedModel) -> Copies | None:
        """What the machine's memory is to keep of a model that is unloaded; None: nothing.

        Belongs to the loading thread. It holds up nobody: weights are read, and not changed.
        """
        return self._sleepers.copied(model, [other for other in self._loaded.models.values() if other is not model])

    def forget(self, key: str) -> None:
        """End a model's sleep, if it sleeps. Belongs to the loading thread."""
        self._sleepers.forget(key)

    def attach(self, model: LoadedModel, serve_others: Callable[[], None]) -> Warmed:
        """Warm a model up and let it be run. Belongs to the thread that owns the device.

        `serve_others` runs what waits for the other models; it is called before each forward pass of the warm-up.

        Raises:
            StartupError: not one token fits into the memory that is left.
        """
        loaded, key = self._loaded, model.key
        limit_memory(loaded.device, self._engine.memory_fraction, self._engine.memory_floor_gb)
        measured = self._measured.get(key)
        before = measured.before if measured is not None and _same(measured.card, model.card) else None
        if before is None:
            before = loader.measured_before(model, self._engine, loaded.device, loaded.common)
        if key in self._of_start:
            # As every model of the start: its layers are compiled where that pays, and others wait as long.
            warmed = warm_up(
                model, self._engine, loaded.runs_on, loaded.common.choices, before, serve_others, at_once=True
            )
        else:
            warmed = warm_up_beside_others(
                model, self._engine, loaded.runs_on, loaded.common.choices, serve_others, before=before
            )
        self._of_start.discard(key)
        if measured is None or before is None:
            self._remember(key, model, warmed)
            loader.keep_measured(model, warmed, self._engine, loaded.common)
        loaded.models[key], loaded.warmed[key] = model, warmed
        loaded.known[key] = Known(loaded.known[key].source, model.card)
        return warmed

    def _remember(self, key: str, model: LoadedModel, warmed: Warmed) -> None:
        # What is measured again at the next start is not in this one: a model is the same each time it is loaded.
        choice = model.choice and replace(model.choice, is_disturbed=False)
        self._measured[key] = _Measured(model.card, Before(warmed, model.threads.single_up_to, choice))

    def measure_again(self, key: str, check: Callable[[], None]) -> None:
        """Measure a model on a CPU as a quiet moment allows it. Does nothing where it is not loaded, or on a GPU.

        Belongs to the thread that owns the device, and takes it until `check`, which is called before each forward
        pass, raises Interrupted.

        The type of its weights stays as it is: another would change the vectors in the middle of somebody's index, and
        void those in the cache. The faster one is taken at the next start.

        Raises:
            Interrupted: nothing has changed.
        """
        loaded, model = self._loaded, self._loaded.models.get(key)
        if model is None:
            return
        if loaded.device.type != "cpu":
            loaded.warmed[key] = replace(loaded.warmed[key], is_provisional=False)
            return
        warmed = measure_again(model, self._engine, loaded.runs_on, loaded.common.choices, check)
        warmed = replace(warmed, next_dtype=self._next_dtype(model, check))
        loaded.warmed[key] = warmed
        self._remember(key, model, warmed)
        loader.keep_measured(model, warmed, self._engine, loaded.common)

    def _next_dtype(self, model: LoadedModel, check: Callable[[], None]) -> str | None:
        """The type of weights that is clearly faster than the present one, which the next start will take."""
        measurements, threads = self._loaded.common.measurements, self._loaded.common.threads
        if not loader.measures_dtype(self._models, self._loaded.device) or measurements is None:
            return None
        width = loader.width_of(model.checkpoint)
        rates = cpu_rates(width, check)
        present = CPU_DTYPES.get(model.card.dtype)
        fastest = max(rates, key=lambda dtype: rates[dtype])
        if present is None or rates[fastest] < FASTER * rates[present]:
            fastest = present or fastest
        measurements.keep_dtype(width, threads, ChosenDtype(fastest, rates_in_words(rates, fastest)))
        if fastest is present or present is None:
            return None
        name = dtype_name(fastest)
        logger.info(
            "%s: %s is faster than %s on this machine when it is quiet (%s): the next start takes it",
            model.card.id,
            name,
            model.card.dtype,
            rates_in_words(rates, fastest),
        )
        return name

    def keep_measured(self) -> None:
        """Remember for the next start what is known by now of the models that are loaded. It writes a file."""
        for key, model in list(self._loaded.models.items()):
            loader.keep_measured(model, self._loaded.warmed[key], self._engine, self._loaded.common)

    def release(self, model: LoadedModel, copies: Copies | None = None) -> None:
        """Take a model out and give back its memory on the device, also where somebody still holds the model.

        Belongs to the thread that owns the device. What it shares with a loaded model stays. With `copies`, which
        `copied` has made, it sleeps on them.
        """
        loaded, common = self._loaded, self._loaded.common
        loaded.models.pop(model.key, None)
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)
        used = {id(part) for other in loaded.models.values() for each in other.model.modules for part in each.modules()}
        model.graphs, model.prefixes = Graphs(), PrefixMemory()
        if not any(id(layer) in used for layer in model.model.layers):
            make_eager(model.model.layers)  # a compiled layer holds itself
        parts = {id(part) for module in model.model.modules for part in module.modules()}
        shared = {key: module for key, module in common.shared.items() if _any_used(module, parts)}
        gone = {key: module for key, module in common.shared.items() if not _any_used(module, used)}
        for key in gone:
            del common.shared[key]
            common.parts.pop(key, None)
        for layer in [layer for layer in common.choices if id(layer) not in used]:
            del common.choices[layer]
        if copies is not None:
            self._sleepers.keep(model, copies, shared)
        else:
            unused = (*gone.values(), *(each for each in model.model.modules if not _any_used(each, used)))
            self._sleepers.emptied(_empty(unused))
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        elif loaded.device.type == "mps":
            torch.mps.empty_cache()


def _read_as(folder: Path, model_id: str, task: Task) -> Checkpoint:
    checkpoint = read(Source(model_id, folder, task))
    check_form(checkpoint)
    return checkpoint


def _read_by_itself(folder: Path, model_id: str) -> Checkpoint:
    """A decoder is a reranker where its files say how it reads pairs; it embeds where they say that.

    Raises:
        StartupError: it is neither.
    """
    try:
        embedder = _read_as(folder, model_id, Task.EMBED)
    except StartupError:
        return _read_as(folder, model_id, Task.RERANK)
    if not embedder.family.is_decoder:
        return embedder
    with suppress(StartupError):
        return _read_as(folder, model_id, Task.RERANK)
    if embedder.published is None and not (folder / "modules.json").is_file():
        raise StartupError(f"{model_id}: nothing in its files says that this language model embeds: send `task`.")
    return embedder


def _same(card: ModelCard, other: ModelCard) -> bool:
    """Whether two loads of a model are of the same files, in the same type and length."""
    return (card.fingerprint, card.dtype, card.max_model_len) == (other.fingerprint, other.dtype, other.max_model_len)


def _any_used(module: nn.Module, used: Iterable[int]) -> bool:
    return any(id(part) in used for part in module.modules())


def _empty(modules: Iterable[nn.Module]) -> set[int]:
    """Let go of modules' tensors; returns their ids.

    Not left to the garbage collector: objects of the start are out of its sight (`gc.freeze`).
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for tensor in tensors:
        nothing = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = nothing.to_mkldnn() if tensor.is_mkldnn else nothing  # only of the same layout
    return {id(tensor) for tensor in tensors}
