"""The configured models: here, or to be fetched, whether that can be done, and whether the disks have room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, get_token
from rich.filesize import decimal

from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.hardware.gpu import FLOAT8
from vecmill.models import hub
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.rerank_prompt import check_form
from vecmill.models.source import BUNDLED_ID, GPU_DEFAULTS, bundled_instead, find, hub_id, is_hub_id
from vecmill.models.weight_files import linear_parameters, parameters
from vecmill.tools.doctor.context import DoctorContext
from vecmill.tools.doctor.findings import Finding, FindingStatus, fail, install, ok, split, together, warn

AUTO, NONE = "auto", "none"
BYTES = {"float32": 4}  # of a parameter; all other types have 2, and fp8 1 for those of linear layers
OTHER_BYTES = 2


@dataclass(frozen=True, slots=True)
class Configured:
    """A configured model. Without checkpoint and problem it is to be fetched from the hub."""

    name: str
    task: Task
    automatic: bool
    """True where `auto` chose it: the server starts without it, on something smaller."""
    checkpoint: Checkpoint | None
    problem: str | None
    """Why its files are of no use, with what would help."""

    @property
    def named(self) -> str:
        """The setting and its value."""
        return f"{self.task.value.upper()}_MODEL={self.name}"

    @property
    def to_fetch(self) -> bool:
        return self.checkpoint is None and self.problem is None

    def weight_bytes(self, dtype: str) -> int | None:
        """Of the weights in memory, loaded as a type; None where the files are not here or cannot be read."""
        if self.checkpoint is None:
            return None
        try:
            files = self.checkpoint.weight_files
            size = parameters(files) * bytes_per_parameter(dtype)
            rounded, _ = linear_parameters(files, self.checkpoint.network.rename) if dtype == FLOAT8 else (0, 0)
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return size - rounded


def configured(context: DoctorContext) -> list[Configured]:
    """The models of EMBED_MODEL, then those of RERANK_MODEL."""
    settings = context.settings.model
    named = [(Task.EMBED, name) for name in settings.embed_model] + [
        (Task.RERANK, name) for name in settings.rerank_model
    ]
    models = []
    for task, name in named:
        if name == AUTO and context.wants_gpu:
            models.append(_from_hub(context, GPU_DEFAULTS[task], task, automatic=True))
        elif name == AUTO and task is Task.EMBED:
            models.append(_here(AUTO, BUNDLED_ID, task))
        elif name not in (AUTO, NONE):
            models.append(_from_hub(context, name, task, automatic=False))
    return models


def _from_hub(context: DoctorContext, name: str, task: Task, *, automatic: bool) -> Configured:
    revision, model = context.settings.model.revision_of(name), hub_id(name)
    if Path(name).expanduser().is_dir() or not is_hub_id(model):
        return _here(name, name, task)
    if (bundled := bundled_instead(model, task, revision)) is not None:
        return _read(name, bundled, automatic=automatic)
    folder = hub.cached(model, revision)
    if folder is None:
        return Configured(name, task, automatic, None, None)
    return _read(name, Source(model, folder, task), automatic=automatic)


def _here(wanted: str, name: str, task: Task) -> Configured:
    try:
        source = find(wanted, task)
    except StartupError as error:
        return Configured(name, task, False, None, error.message)
    return _read(name, source, automatic=False)


def _read(name: str, source: Source, *, automatic: bool) -> Configured:
    try:
        checkpoint = read(source)
        check_form(checkpoint)
        _ = checkpoint.weight_files  # which must be there
    except StartupError as error:
        return Configured(name, source.task, automatic, None, error.message)
    return Configured(name, source.task, automatic, checkpoint, None)


def bytes_per_parameter(dtype: str) -> int:
    """Bytes of a parameter in memory; for `auto` the smaller of the types it may become."""
    return BYTES.get(dtype, OTHER_BYTES)


HUB_SECONDS = 10.0


def check_models(context: DoctorContext) -> Finding:
    """Look at each model; the hub is asked only for what is not in its cache."""
    models = configured(context)
    if not models:
        return fail("no model is configured", "Set EMBED_MODEL.")
    parts = [_judge_model(context, model) for model in models]
    fetching = any(model.to_fetch for model in models)
    if fetching and find_spec("hf_xet") is None:
        parts.append(warn("hf_xet is not installed: downloads are slower", install("hf_xet")))
    details = {
        "cache": constants.HF_HUB_CACHE,
        "endpoint": constants.ENDPOINT,
        "offline": constants.HF_HUB_OFFLINE,
        "token": _token(context),
    }
    return together([*parts, ok("", **details)])


def _judge_model(context: DoctorContext, model: Configured) -> Finding:
    if model.problem is not None:
        setting = f"{model.task.value.upper()}_MODEL"
        return fail(model.problem, f"Set {setting} to a folder with a model's files, a hub id (owner/name), or auto.")
    if model.checkpoint is not None:
        size = decimal(model.checkpoint.weight_bytes)
        commit = f", revision {model.checkpoint.commit}" if model.checkpoint.commit else ""
        return ok(f"{model.named}: {size} in {model.checkpoint.folder}{commit}")
    plan = context.plan(model.name, HUB_SECONDS)
    return _unreachable(model, plan) if isinstance(plan, StartupError) else _to_fetch(model, plan)


def _unreachable(model: Configured, error: StartupError) -> Finding:
    sentence = f"{model.named} is not here: {error.message.removeprefix(f'{model.name}: ')}"
    pull = f"\nvecmill pull {model.name}" if model.automatic or constants.HF_HUB_OFFLINE else ""
    if constants.HF_HUB_OFFLINE:
        sentence = f"{model.named} is not here, and HF_HUB_OFFLINE=1 forbids fetching it: Unset HF_HUB_OFFLINE."
    finding = split(warn if model.automatic else fail, sentence)
    instead = ""
    if model.automatic:
        small = "the small bundled model is served" if model.task is Task.EMBED else "documents are ranked by cosine"
        instead = f"; until it is, {small}"
    return replace(finding, seen=finding.seen + instead, cure=f"{finding.cure or ''}{pull}".strip())


def _to_fetch(model: Configured, plan: hub.Plan) -> Finding:
    seen = f"{model.named}: not here yet, {decimal(plan.missing_size)} to fetch at the start; licence {plan.licence}"
    pull = f"vecmill pull {model.name}"
    if plan.non_commercial:
        return warn(f"{seen}, which forbids commercial use", f"{pull} (fetches it now)")
    return Finding(FindingStatus.OK, seen, f"{pull} (fetches it now)")


def _token(context: DoctorContext) -> str:
    """Where a token comes from; never the token."""
    if context.settings.model.hf_token is not None:
        return "HF_TOKEN"
    return "hf auth login" if get_token() else "none"


LEAST = 100_000_000  # bytes: below, little can be kept


def check_disk(context: DoctorContext) -> Finding:
    """Look at the disk of the hub's cache, then at that of STATE_DIR."""
    return together([_judge_hub_cache(context), _judge_state_dir(context)])


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _judge_hub_cache(context: DoctorContext) -> Finding:
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(existing(cache)).free
    plans = [context.plan(model.name, HUB_SECONDS) for model in configured(context) if model.to_fetch]
    missing = sum(plan.missing_size for plan in plans if not isinstance(plan, StartupError))
    return judge_cache(cache, free, missing, unknown=any(isinstance(plan, StartupError) for plan in plans))


def judge_cache(cache: Path, free: int, missing: int, *, unknown: bool) -> Finding:
    """`missing`: bytes to be fetched; `unknown`: the hub does not say of all models how much that is."""
    seen = f"{decimal(free)} free for models in {cache}"
    seen += f", {decimal(missing)} to be fetched" if missing else "" if unknown else ", nothing to be fetched"
    seen += ", and of some it is not known how much" if unknown else ""
    facts = {"cache_free_bytes": free, "to_fetch_bytes": missing}
    if free < missing:
        return fail(seen, "Make room, or set HF_HOME to a folder on a larger disk.", **facts)
    return ok(seen, **facts)


def _judge_state_dir(context: DoctorContext) -> Finding:
    settings = context.settings
    folder = settings.state.state_dir
    free = shutil.disk_usage(existing(folder)).free
    used = _size(folder.rglob("*"))
    cache = settings.cache.cache_max_bytes if settings.state.redis_url is None else 0
    return judge_state(folder, free, max(0, cache - used), files=settings.batches.max_files_bytes)


def judge_state(folder: Path, free: int, allowed: int, *, files: int) -> Finding:
    """`allowed`: bytes that the cache may still take; `files`: those of batches, which come only when uploaded."""
    seen = f"{decimal(free)} free for STATE_DIR={folder}"
    seen += f", whose cache may take {decimal(allowed)} more" if allowed else ""
    facts = {"state_free_bytes": free, "state_allowed_bytes": allowed}
    if free < min(LEAST, allowed + files):
        return fail(seen, "Make room, or set STATE_DIR to a folder on a larger disk.", **facts)
    if free < allowed:
        return warn(
            seen,
            "Lower CACHE_MAX_BYTES to what fits: on a full disk batches wait, and searches go on.",
            **facts,
        )
    return ok(seen, **facts)


def _size(paths: Iterable[Path]) -> int:
    size = 0
    for path in paths:
        try:
            size += path.stat().st_size
        except OSError:  # a file of a moment, or a folder of somebody else's
            continue
    return size
