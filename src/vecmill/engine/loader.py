"""From settings to warm models on the device: which models they mean, then reading, loading and warming them up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.calibration import Warmed
from vecmill.core.errors import StartupError, first_line, is_out_of_memory
from vecmill.core.types import ModelCard, Task
from vecmill.engine import determinism
from vecmill.engine.device import (
    ChosenDtype,
    check_type,
    choose_device,
    choose_dtype,
    configure_device,
    describe,
    expected_dtype,
    has_flash_attention,
    limit_memory,
    remember_on_cpu,
)
from vecmill.engine.float8_models import NOT_ROUNDED, can_be_rounded, load_in_float8
from vecmill.engine.forward import CpuThreads, Device, LoadedModel, give_way_between
from vecmill.engine.measurements import Before, Measurements, identity
from vecmill.engine.warmup import Choices, largest_size, most_tokens, warm_up
from vecmill.hardware.memory import GpuRoom
from vecmill.models.cards import OnDevice, aliases_of, make_card, with_aliases
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.family import BiasTable
from vecmill.models.networks import Model, load_model, sizes
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import Attention
from vecmill.models.prepacked_linears import prepack
from vecmill.models.rerank_prompt import check_form
from vecmill.models.source import GPU_DEFAULTS, find
from vecmill.models.tokenizer_files import ReadTokenizer
from vecmill.models.tokenizer_loading import load_tokenizer
from vecmill.models.weight_files import linear_parameters, parameters
from vecmill.models.weights import Target

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]
"""Called with percent done (0..100) and what is being done."""

GIGABYTE = 1e9
USUAL_WIDTH = 1024  # of hidden states, where config.json leaves it to the class's default


@dataclass(frozen=True, slots=True)
class Known:
    """A model that can be loaded, whether it is or not."""

    source: Source
    card: ModelCard
    """Before it is loaded for the first time: what its files say beside the weights."""


@dataclass(frozen=True, slots=True)
class Common:
    """What models have in common, or have again when they are loaded again."""

    shared: dict[tuple[Path, str], nn.Module] = field(default_factory=dict)
    """Networks by folder: one that is named twice is loaded once."""
    parts: dict[tuple[Path, str], Mapping[str, str]] = field(default_factory=dict)
    """What was read for each of them."""
    choices: Choices = field(default_factory=dict)
    threads: int = field(default_factory=torch.get_num_threads)
    """All that a forward pass may have on a CPU."""
    measurements: Measurements | None = None
    """Of this start and of those before; None: they are not kept."""
    room: Callable[[], GpuRoom | None] = lambda: None
    """What there is of the GPU's memory now; None on a CPU."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that loading and warm-up found out. `LiveModels` changes it while the server runs."""

    runs_on: Device
    models: dict[str, LoadedModel]
    """By key, in the order of the settings, embedding models first."""
    warmed: dict[str, Warmed]
    """By key; of models that were unloaded, too."""
    known: dict[str, Known] = field(default_factory=dict)
    """All models that can be loaded, by key: those of the settings in their order, then those listed from the hub's
    cache."""
    common: Common = field(default_factory=Common)
    flash: bool = False
    """Whether flash attention is used where a model can be run with it."""
    to_load: tuple[str, ...] = ()
    """Keys of the models that belong to the start and are not loaded yet, in the order of the settings."""

    @property
    def device(self) -> torch.device:
        """That the models are on."""
        return self.runs_on.device


def load(
    models: ModelSettings,
    engine: EngineSettings,
    report: Report,
    measurements: Measurements | None = None,
    *,
    at_once: bool = False,
) -> Loaded:
    """Find every model, load and warm them up. `measurements`: of earlier starts; what is measured now is kept there
    too. `at_once`: only the first model is loaded, and on a CPU no more than a first look is taken at what its passes
    cost; the others are checked, and named in `to_load`.

    Raises:
        StartupError: the device, a folder or a weight is not as it must be.
    """
    report(5, "choosing the device")
    device = choose_device(engine.device)
    check_type(models.dtype, device)
    if models.deterministic:
        determinism.check(device)
        determinism.configure(device)
    configure_device(device, engine.memory_fraction, engine.memory_floor_gb)
    flash = _uses_flash_attention(device, wanted=engine.use_flash_attn)
    report(8, "finding the models")
    checkpoints = [read(source) for source in chosen_sources(models, device, partial(report, 8))]
    for checkpoint in checkpoints:
        check_form(checkpoint)  # what cannot be run is refused before any weights are read
    named, aliases = _names(_all_capped(checkpoints, models.max_model_len), models.model_aliases)
    room = partial(limit_memory, device, engine.memory_fraction, engine.memory_floor_gb)
    common = Common(measurements=measurements, room=room)
    recall_dtypes(named, common, models, device)
    distinct = _within_room(named, models, device)
    now = distinct[:1] if at_once else distinct
    tokenizers = [load_tokenizer(checkpoint) for checkpoint in now]
    check_room(distinct, models, engine, device)
    report = partial(_share, report, len(now) / max(1, len(distinct)))
    try:
        loaded = load_all(
            list(zip(now, tokenizers, strict=True)),
            aliases,
            models,
            device,
            report,
            flash=flash,
            common=common,
            compiled=engine.torch_compile == "true",
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartupError(
            f"The weights do not fit into the memory of {describe(device)}: {first_line(error)}"
        ) from None
    runs_on = Device.of(device, common.threads)
    warmed = {}
    for index, model in enumerate(loaded):
        report(85 + 15 * index / len(loaded), f"warming up {model.card.id}")
        limit_memory(device, engine.memory_fraction, engine.memory_floor_gb)
        before = measured_before(model, engine, device, common)
        warmed[model.key] = warm_up(model, engine, runs_on, common.choices, before, at_once=at_once)
        if before is None:
            keep_measured(model, warmed[model.key], engine, common)
    cards = {checkpoint: model.card for checkpoint, model in zip(now, loaded, strict=False)}
    known = {checkpoint: _known(checkpoint, cards.get(checkpoint), aliases, models, device) for checkpoint in named}
    return Loaded(
        runs_on,
        {model.key: model for model in loaded},
        warmed,
        {each.card.key: each for each in known.values()},
        common,
        flash,
        tuple(known[checkpoint].card.key for checkpoint in distinct[len(now) :]),
    )


def _known(
    checkpoint: Checkpoint,
    card: ModelCard | None,
    aliases: Mapping[str, tuple[str, ...]],
    models: ModelSettings,
    device: torch.device,
) -> Known:
    """`card`: None where it is not loaded."""
    if card is None:
        chosen = _dtype(checkpoint, models, device)
        card = expected_card(checkpoint, aliases[checkpoint.id], models, device, chosen)
    return Known(checkpoint.source, card)


def _share(report: Report, share: float, percent: float, message: str) -> None:
    """Report progress of a part of the start."""
    report(share * percent, message)


def recall_dtypes(
    checkpoints: Sequence[Checkpoint], common: Common, models: ModelSettings, device: torch.device
) -> None:
    """Have models on a CPU get the type that an earlier start has measured to be the fastest, and keep for the next one
    what this start measures."""
    if not measures_dtype(models, device) or common.measurements is None:
        return
    for width in {width_of(checkpoint) for checkpoint in checkpoints}:
        if (kept := common.measurements.dtype_of(width, common.threads)) is not None:
            remember_on_cpu(width, kept)
        common.measurements.keep_dtype(width, common.threads, choose_dtype(models.dtype, device, width))


def measures_dtype(models: ModelSettings, device: torch.device) -> bool:
    """Whether the type of the weights is the one that is measured to be the fastest."""
    return _is_dtype_open(models, device) and not models.deterministic


DETERMINED_DTYPE = ChosenDtype(torch.float32, "DETERMINISTIC=true: the fastest type may be another at the next start")


def measured_before(model: LoadedModel, engine: EngineSettings, device: torch.device, common: Common) -> Before | None:
    """What an earlier start measured of a model; None: it has to be measured."""
    if common.measurements is None:
        return None
    key, most = _identity(model, engine, common), most_tokens(engine, device)
    return common.measurements.of(key, most_tokens=most, most_rows=largest_size(engine, device, most))


def _identity(model: LoadedModel, engine: EngineSettings, common: Common) -> str:
    return identity(model.card, engine, model.attention, common.threads)


def keep_measured(model: LoadedModel, warmed: Warmed, engine: EngineSettings, common: Common) -> None:
    """Remember what is known of a loaded model, for later starts."""
    if common.measurements is None:
        return
    key = _identity(model, engine, common)
    common.measurements.keep(key, Before(warmed, model.threads.single_up_to, model.choice))


def _within_room(named: Sequence[Checkpoint], models: ModelSettings, device: torch.device) -> list[Checkpoint]:
    """The models that are loaded at the start: in order, each whose weights still fit into MAX_LOADED_GB.

    Raises:
        StartupError: one alone takes more.
    """
    max_loaded_gb = models.max_loaded_gb
    if max_loaded_gb is None:
        return list(named)
    most, chosen = max_loaded_gb * GIGABYTE, list[Checkpoint]()
    for checkpoint in named:
        alone = weights_in_memory([checkpoint], models, device)
        if alone > most:
            raise StartupError(
                f"MAX_LOADED_GB={max_loaded_gb:g}: the weights of {checkpoint.id} alone take "
                f"{alone / GIGABYTE:.2f} GB: raise it, or name a smaller model."
            )
        if weights_in_memory([*chosen, checkpoint], models, device) <= most:
            chosen.append(checkpoint)
        else:
            logger.info("%s is loaded when a request names it (MAX_LOADED_GB)", checkpoint.id)
    return chosen


def expected_card(
    checkpoint: Checkpoint,
    aliases: tuple[str, ...],
    models: ModelSettings,
    device: torch.device,
    chosen: ChosenDtype | None = None,
) -> ModelCard:
    """What a model that is not loaded will be, by its files beside the weights.

    `chosen`: the type of its weights; None: what is likely, for nothing is measured here.

    Raises:
        StartupError: it has no weights that can be read.
    """
    config, chosen = sizes(checkpoint), chosen or _for(checkpoint, _expected_dtype(models, device))
    try:
        weight_bytes = _bytes_in_memory(checkpoint, chosen)
    except (OSError, ValueError) as error:
        raise StartupError(f"{checkpoint.named}: its weights cannot be read ({first_line(error)}).") from None
    on_device = OnDevice(
        width=(
            checkpoint.width_after_heads(getattr(config, checkpoint.family.width_key))
            if checkpoint.task is Task.EMBED
            else 1
        ),
        vocab_size=config.vocab_size,
        dtype=chosen.name,
        dtype_reason=chosen.reason,
        device=describe(device),
        weight_bytes=weight_bytes,
    )
    return make_card(checkpoint, on_device, aliases, models.query_instruction)


def _expected_dtype(models: ModelSettings, device: torch.device) -> ChosenDtype:
    return DETERMINED_DTYPE if _is_determined(models, device) else expected_dtype(models.dtype, device)


def _is_determined(models: ModelSettings, device: torch.device) -> bool:
    """Whether the type is not measured for the sake of DETERMINISTIC."""
    return _is_dtype_open(models, device) and models.deterministic


def _is_dtype_open(models: ModelSettings, device: torch.device) -> bool:
    """Whether neither DTYPE nor the device decides the type."""
    return models.dtype == "auto" and device.type == "cpu"


def _uses_flash_attention(device: torch.device, *, wanted: bool) -> bool:
    """USE_FLASH_ATTN, on a GPU that has such kernels; on another they are never tried."""
    if not wanted or device.type != "cuda":
        return False
    if not has_flash_attention(device):
        logger.info("%s has no flash attention: SDPA is used", describe(device))
        return False
    return True


def check_room(
    checkpoints: Sequence[Checkpoint], models: ModelSettings, engine: EngineSettings, device: torch.device
) -> None:
    """Say that the weights do not fit before a byte of them is read: a GB10 that runs out of memory freezes.

    Raises:
        StartupError: they do not.
    """
    needed = weights_in_memory(checkpoints, models, device)  # raises, too, for a type that a family cannot be run in
    room = limit_memory(device, engine.memory_fraction, engine.memory_floor_gb)
    if room is not None and (shortage := room.shortage(needed)) is not None:
        names = ", ".join(checkpoint.id for checkpoint in checkpoints)
        raise StartupError(f"The weights of {names} do not fit: {shortage}")


def weights_in_memory(checkpoints: Sequence[Checkpoint], models: ModelSettings, device: torch.device) -> int:
    """Bytes of all weights in the types that they get; a folder that is named twice counts once."""
    sizes: dict[Path, int] = {}
    for checkpoint in checkpoints:
        chosen = _dtype(checkpoint, models, device)
        with suppress(OSError, ValueError):  # the error is better when they are read
            sizes[checkpoint.folder.resolve()] = _bytes_in_memory(checkpoint, chosen)
    return sum(sizes.values())


def _bytes_in_memory(checkpoint: Checkpoint, chosen: ChosenDtype) -> int:
    """Of a checkpoint's weights in a type, and of its table of position biases; its heads are float32.

    Raises OSError or ValueError as `parameters`.
    """
    heads = parameters(checkpoint.head_files) * torch.float32.itemsize
    table = BiasTable.of(checkpoint.network.position_bias, checkpoint.config)
    bias = table.size(chosen.dtype.itemsize) if table is not None else 0
    size = parameters(checkpoint.weight_files) * chosen.dtype.itemsize + heads + bias
    if not chosen.float8:
        return size
    rounded, scales = linear_parameters(checkpoint.weight_files, checkpoint.network.rename)
    return size - rounded * (chosen.dtype.itemsize - 1) + scales * torch.float32.itemsize


def _all_capped(checkpoints: Sequence[Checkpoint], max_model_len: int | None) -> list[Checkpoint]:
    if max_model_len is None:
        return list(checkpoints)
    if max_model_len > (longest := max(checkpoint.max_model_len for checkpoint in checkpoints)):
        names = ", ".join(checkpoint.id for checkpoint in checkpoints if checkpoint.max_model_len == longest)
        raise StartupError(f"MAX_MODEL_LEN={max_model_len} is above the {longest} tokens that {names} takes: lower it.")
    return [capped(each, max_model_len) for each in checkpoints]


def capped(checkpoint: Checkpoint, max_model_len: int | None) -> Checkpoint:
    """The checkpoint with texts of MAX_MODEL_LEN tokens at most."""
    if max_model_len is None:
        return checkpoint
    return replace(checkpoint, max_model_len=min(checkpoint.max_model_len, max_model_len))


def _names(
    checkpoints: Sequence[Checkpoint], model_aliases: Iterable[tuple[str, str]]
) -> tuple[list[Checkpoint], dict[str, tuple[str, ...]]]:
    """Each folder once for a task, and the other names of each id."""
    distinct: list[Checkpoint] = []
    named: dict[str, str] = {}  # every name to the id of its model
    for checkpoint in checkpoints:
        same = next((other for other in distinct if _same_folder(checkpoint, other)), None)
        if same is None and any((other.task, other.id) == (checkpoint.task, checkpoint.id) for other in distinct):
            raise StartupError(f"{checkpoint.named}: two models would have this name; rename one of the folders.")
        if same is None:
            distinct.append(checkpoint)
        named[checkpoint.id] = (same or checkpoint).id
    known = with_aliases(named, model_aliases)
    return distinct, {checkpoint.id: aliases_of(checkpoint.id, known) for checkpoint in distinct}


def _same_folder(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    return (checkpoint.task, checkpoint.folder.resolve()) == (other.task, other.folder.resolve())


def load_all(
    checkpoints: Sequence[tuple[Checkpoint, ReadTokenizer]],
    aliases: dict[str, tuple[str, ...]],
    settings: ModelSettings,
    device: torch.device,
    report: Report,
    *,
    flash: bool,
    common: Common,
    compiled: bool = False,
    counted: set[int] | None = None,
) -> list[LoadedModel]:
    """Put models' weights on the device.

    Args:
        compiled: whether layers will be compiled: their weights stay as torch's own layers have them, and what is
            compiled is for one number of threads.
        counted: where the weights are that other models have loaded.
    """
    total = sum(checkpoint.weight_bytes for checkpoint, _ in checkpoints) or 1
    read_bytes = 0
    name = ""

    def progress(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count
        done = f"{read_bytes / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB"
        report(10 + 75 * min(1, read_bytes / total), f"loading {name}: {done}")

    loaded = []
    counted = set() if counted is None else counted
    for checkpoint, tokenizer in checkpoints:
        name = checkpoint.id
        progress(0)
        chosen = _dtype(checkpoint, settings, device)
        target = Target(chosen.dtype, device, progress, common.shared, common.parts)
        how = partial(_attention, checkpoint, target, flash=flash, timed=not settings.deterministic)
        if chosen.float8:
            size = _bytes_in_memory(checkpoint, replace(chosen, float8=False))
            model, reason = load_in_float8(checkpoint, tokenizer, target, how, common.room(), size)
            chosen = replace(chosen, reason=reason)
        else:
            model = load_model(checkpoint, target)
            if not compiled:
                prepack(model, timed=not settings.deterministic)
        if device.type == "cpu":
            give_way_between(model.layers)
        alone, attention = settings.deterministic, how(model)
        on_device = OnDevice(
            width=model.width,
            vocab_size=model.vocab_size,
            dtype=chosen.name,
            dtype_reason=chosen.reason,
            device=describe(device),
            weight_bytes=uncounted_bytes(model, counted),
            numerics=determinism.numerics(device, attention, common.threads) if alone else None,
        )
        card = make_card(checkpoint, on_device, aliases[checkpoint.id], settings.query_instruction)
        threads = CpuThreads(common.threads, fixed=alone, divides=not compiled)
        loaded.append(LoadedModel(card, checkpoint, model, tokenizer, attention, threads=threads, alone=alone))
    return loaded


def _attention(checkpoint: Checkpoint, target: Target, model: Model, *, flash: bool, timed: bool) -> Attention:
    largest_head = model.largest_head
    return attention_of(checkpoint, target.device, target.dtype, flash=flash, timed=timed, largest_head=largest_head)


def attention_of(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    flash: bool,
    timed: bool = True,
    largest_head: int = 0,
) -> Attention:
    """What computes attention.

    Args:
        flash: whether its kernels are wanted, and the device has them.
        timed: whether the choice may depend on how long each takes.
        largest_head: values of a head at most.
    """
    flash = flash and checkpoint.network.position_bias is None
    return attention_on(device, dtype, flash=flash, timed=timed, largest_head=largest_head)


def width_of(checkpoint: Checkpoint) -> int:
    """Of its hidden states."""
    return checkpoint.family.width(checkpoint.config) or USUAL_WIDTH


def _dtype(checkpoint: Checkpoint, models: ModelSettings, device: torch.device) -> ChosenDtype:
    """The type that its weights get. Raises StartupError for float16 where the family's hidden states overflow."""
    if _is_determined(models, device):
        return DETERMINED_DTYPE
    chosen = choose_dtype(models.dtype, device, width_of(checkpoint))
    if chosen.dtype is torch.float16 and not checkpoint.family.float16:
        raise StartupError(
            f"{checkpoint.named}: the hidden states of {checkpoint.family.model_type} go beyond the range of float16: "
            f"set DTYPE to auto, bfloat16 or float32."
        )
    return _for(checkpoint, chosen)


def _for(checkpoint: Checkpoint, chosen: ChosenDtype) -> ChosenDtype:
    """What becomes of a type for a model that has nothing to be rounded."""
    return chosen if not chosen.float8 or can_be_rounded(checkpoint) else ChosenDtype(chosen.dtype, NOT_ROUNDED)


def uncounted_bytes(model: Model, counted: set[int]) -> int:
    """Bytes of the weights, and of what was computed from them, that no earlier model shares.

    `counted`: places of all that was counted; added to.
    """
    size = 0
    for module in model.modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if (place := place_of(tensor)) not in counted:
                counted.add(place)
                size += tensor.numel() * tensor.element_size()
    return size


def place_of(tensor: Tensor) -> int:
    """The address of its values; of a prepacked weight, which has none, what tells it from all other tensors."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


AUTO = "auto"
NONE = "none"


def chosen_sources(
    models: ModelSettings, device: torch.device, report: Callable[[str], None] = lambda message: None
) -> list[Source]:
    """The folders of EMBED_MODEL, then those of RERANK_MODEL; `report` is told of what is fetched from the hub.

    Raises:
        StartupError: one is not to be found.
    """
    named = [(Task.EMBED, name) for name in models.embed_model] + [(Task.RERANK, name) for name in models.rerank_model]
    sources = (_find(task, name, models, device, report) for task, name in named if name != NONE)
    return [source for source in sources if source is not None]


def _find(
    task: Task, name: str, models: ModelSettings, device: torch.device, report: Callable[[str], None]
) -> Source | None:
    if name != AUTO:
        return _named(task, name, models, report)
    if device.type == "cuda":
        default = GPU_DEFAULTS[task]
        try:
            return _named(task, default, models, report)
        except StartupError as error:
            instead = "the small bundled model is served" if task is Task.EMBED else "documents are ranked by cosine"
            logger.warning("%s INSTEAD, %s. `vecmill pull %s` fetches it.", error.message, instead, default)
    return find(AUTO, task) if task is Task.EMBED else None


def _check(source: Source) -> None:
    checkpoint = read(source)
    check_form(checkpoint)
    load_tokenizer(checkpoint)


def _named(task: Task, name: str, models: ModelSettings, report: Callable[[str], None]) -> Source:
    token = models.hf_token.get_secret_value() if models.hf_token else None
    # What no family here can run is refused before its weights are fetched.
    return find(
        name,
        task,
        hf_token=token,
        revision=models.revision_of(name),
        check=_check,
        report=lambda fetched, complete: report(f"fetching {name}: {fetched / 1e9:.1f} GB, {complete} files complete"),
    )
