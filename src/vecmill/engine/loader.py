"""From settings to warm models on the device: which models they mean, then reading, loading and warming them up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vecmill.config import EngineSettings, ModelSettings
from vecmill.core.errors import StartupError
from vecmill.core.types import ModelCard, Task
from vecmill.engine.device import (
    ChosenDtype,
    choose_device,
    choose_dtype,
    configure_device,
    describe,
    dtype_name,
    has_flash_attention,
    is_out_of_memory,
    limit_memory,
)
from vecmill.engine.loaded import Device, Loaded, LoadedModel, Streams
from vecmill.engine.warmup import Choices, warm_up
from vecmill.models import cards
from vecmill.models import checkpoint as checkpoints
from vecmill.models.aliases import aliases_of, with_aliases
from vecmill.models.checkpoint import Checkpoint, read
from vecmill.models.registry import Model, family
from vecmill.models.source import GPU_DEFAULTS, Source, find
from vecmill.models.tokenizer_files import ReadTokenizer
from vecmill.models.tokenizer_loading import load_tokenizer
from vecmill.models.weight_files import parameters
from vecmill.models.weights import Target

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]
"""Called with percent done (0..100) and what is being done."""

GIGABYTE = 1e9


def load(models: ModelSettings, engine: EngineSettings, report: Report) -> Loaded:
    """Find, load and warm up every model.

    Raises:
        StartupError: the device, a folder or a weight is not as it must be.
    """
    report(5, "choosing the device")
    device = choose_device(engine.device)
    configure_device(device, engine.memory_fraction, engine.memory_floor_gb)
    engine = engine.model_copy(update={"use_flash_attn": _uses_flash_attention(device, wanted=engine.use_flash_attn)})
    report(8, "finding the models")
    found = [checkpoints.read(source) for source in chosen_sources(models, device, partial(report, 8))]
    for one in found:
        family(one)  # what cannot be run is refused before any weights are read
    capped = _cap_lengths(found, models.max_model_len)
    distinct, aliases = _names(capped, models.model_aliases)
    tokenizers = [load_tokenizer(one) for one in distinct]
    _check_room(distinct, models, engine, device)
    try:
        loaded = _load_all(list(zip(distinct, tokenizers, strict=True)), aliases, models, device, report)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartupError(
            f"The weights do not fit into the memory of {describe(device)}: {_first_line(error)}"
        ) from None
    streams = Streams.on(device) if device.type == "cuda" else None
    runs_on = Device(device, engine.use_flash_attn, streams)
    warmed, choices = {}, Choices()
    for index, model in enumerate(loaded):
        report(85 + 15 * index / len(loaded), f"warming up {model.card.id}")
        limit_memory(device, engine.memory_fraction, engine.memory_floor_gb)
        warmed[model.key] = warm_up(model, engine, runs_on, choices)
    return Loaded(runs_on, {model.key: model for model in loaded}, warmed)


def _uses_flash_attention(device: torch.device, *, wanted: bool) -> bool:
    """USE_FLASH_ATTN, unless it is a GPU that has no such kernels: they are then never tried."""
    if not wanted or device.type != "cuda" or has_flash_attention(device):
        return wanted
    logger.info("%s has no flash attention: SDPA is used", describe(device))
    return False


def _check_room(
    found: Sequence[Checkpoint], models: ModelSettings, engine: EngineSettings, device: torch.device
) -> None:
    """Say that the weights do not fit before a byte of them is read: a GB10 that runs out of memory freezes.

    Raises:
        StartupError: they do not.
    """
    room = limit_memory(device, engine.memory_fraction, engine.memory_floor_gb)
    if room is not None and (shortage := room.shortage(_weights_in_memory(found, models, device))) is not None:
        raise StartupError(f"The weights of {', '.join(one.id for one in found)} do not fit: {shortage}")


def _weights_in_memory(found: Sequence[Checkpoint], models: ModelSettings, device: torch.device) -> int:
    """Bytes of all weights in the types that they get; a folder that is named twice counts once."""
    sizes: dict[Path, int] = {}
    for one in found:
        try:
            count = parameters(one.weight_files)
        except (OSError, ValueError):  # said better when they are read
            continue
        sizes[one.folder.resolve()] = count * choose_dtype(models.dtype, device, _width(one)).dtype.itemsize
    return sum(sizes.values())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cap_lengths(found: Sequence[Checkpoint], max_model_len: int | None) -> list[Checkpoint]:
    if max_model_len is None:
        return list(found)
    if max_model_len > (longest := max(one.max_model_len for one in found)):
        names = ", ".join(one.id for one in found if one.max_model_len == longest)
        raise StartupError(f"MAX_MODEL_LEN={max_model_len} is above the {longest} tokens that {names} takes: lower it.")
    return [replace(one, max_model_len=min(one.max_model_len, max_model_len)) for one in found]


def _names(
    found: Sequence[Checkpoint], model_aliases: Iterable[tuple[str, str]]
) -> tuple[list[Checkpoint], dict[str, tuple[str, ...]]]:
    """Each folder once for a task, and the other names of each id."""
    distinct: list[Checkpoint] = []
    named: dict[str, str] = {}  # every name to the id of its model
    for one in found:
        same = next((other for other in distinct if _same_folder(one, other)), None)
        if same is None and any((other.task, other.id) == (one.task, one.id) for other in distinct):
            raise StartupError(f"{one.named}: two models would have this name; rename one of the folders.")
        if same is None:
            distinct.append(one)
        named[one.id] = (same or one).id
    known = with_aliases(named, model_aliases)
    return distinct, {one.id: aliases_of(one.id, known) for one in distinct}


def _same_folder(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.task, one.folder.resolve()) == (other.task, other.folder.resolve())


def _load_all(
    found: Sequence[tuple[Checkpoint, ReadTokenizer]],
    aliases: dict[str, tuple[str, ...]],
    settings: ModelSettings,
    device: torch.device,
    report: Report,
) -> list[LoadedModel]:
    total = sum(one.weight_bytes for one, _ in found) or 1
    read = 0
    name = ""

    def progress(count: int) -> None:
        nonlocal read
        read += count
        report(10 + 75 * min(1, read / total), f"loading {name}: {read / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB")

    shared: dict[tuple[Path, type], nn.Module] = {}
    parts: dict[tuple[Path, type], Mapping[str, str]] = {}
    loaded = []
    counted: set[int] = set()
    for one, tokenizer in found:
        name = one.id
        build = family(one)
        progress(0)
        chosen = choose_dtype(settings.dtype, device, _width(one))
        model = build(one, Target(chosen.dtype, device, progress, shared, parts))
        card = _card(one, model, chosen, device, _uncounted_bytes(model, counted))
        prompts = cards.prompts(one, settings.query_instruction)
        card = replace(
            card,
            prompts=prompts.by_name,
            default_prompt_name=prompts.default_name,
            prompts_from=prompts.source,
            instruction_template=cards.instruction_template(prompts.by_name),
            aliases=aliases[one.id],
        )
        loaded.append(LoadedModel(card, one, model, tokenizer))
    return loaded


def _width(checkpoint: Checkpoint) -> int:
    said = checkpoint.config
    return int(said.get("hidden_size") or said.get("n_embd") or 1024)


def _uncounted_bytes(model: Model, counted: set[int]) -> int:
    size = 0
    for module in model.modules:
        for tensor in module.parameters():
            if tensor.data_ptr() not in counted:
                counted.add(tensor.data_ptr())
                size += tensor.numel() * tensor.element_size()
    return size


def _card(
    checkpoint: Checkpoint, model: Model, chosen: ChosenDtype, device: torch.device, weight_bytes: int
) -> ModelCard:
    """What the files and the device decide; prompts and aliases are the settings'."""
    embeds = checkpoint.pooling is not None
    return ModelCard(
        id=checkpoint.id,
        task=checkpoint.task,
        family=checkpoint.model_type,
        revision=checkpoint.revision,
        fingerprint=checkpoint.fingerprint.hex,
        dimensions=model.width if embeds else None,
        supported_dimensions=cards.supported_dimensions(checkpoint, model.width) if embeds else (),
        max_model_len=checkpoint.max_model_len,
        vocab_size=model.vocab_size,
        pooling=checkpoint.pooling,
        dtype=dtype_name(chosen.dtype),
        dtype_reason=chosen.reason,
        device=describe(device),
        weight_bytes=weight_bytes,
        similarity=checkpoint.similarity,
        unit_vectors=checkpoint.normalizes,
        layer_norm_before_slice=cards.layer_norm_before_slice(checkpoint),
    )


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
    found = (_find(task, name, models, device, report) for task, name in named if name != NONE)
    return [source for source in found if source is not None]


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
    family(checkpoint)
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
