"""All groups together, and the rules between them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_type_hints

from pydantic import ValidationError

from vecmill.config.groups import (
    AccessSettings,
    BatchSettings,
    CacheSettings,
    EngineSettings,
    GenerationSettings,
    HttpSettings,
    InferenceSettings,
    JobSettings,
    LogSettings,
    ModelSettings,
    SchedulerSettings,
    SettingsGroup,
    StateSettings,
)
from vecmill.config.key_file import with_key_file
from vecmill.core.errors import StartupError

# Values that no sentence repeats. A wrong address may hold a password.
SECRETS = frozenset(
    {"hf_token", "generation_url", "generation_api_key", "api_key", "admin_api_key", "redis_url", "replica_url"}
)

CLOSE = 0.85  # of difflib's ratio: an environment has many names that are nobody's mistake
ASSIGNED = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)\s*=", re.MULTILINE | re.ASCII)  # in a `.env`
LONGEST_NAME = 40  # characters, of a variable that may be a misspelt setting


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration of one server."""

    model: ModelSettings
    engine: EngineSettings
    scheduler: SchedulerSettings
    inference: InferenceSettings
    state: StateSettings
    cache: CacheSettings
    jobs: JobSettings
    batches: BatchSettings
    http: HttpSettings
    access: AccessSettings
    generation: GenerationSettings
    log: LogSettings


GROUPS: tuple[type[SettingsGroup], ...] = tuple(get_type_hints(Settings).values())
"""The classes of the fields of `Settings`, in their order."""


def load_settings(flags: Mapping[str, object] | None = None, env_file: Path | str | None = None) -> Settings:
    """Read the settings: `flags` (by field name, None where not given) over environment over `.env` over default.

    `env_file` is read in place of `.env`, and must be there.

    Raises:
        StartupError: a value is unknown or two settings contradict each other; one sentence with the cure.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    usual = GROUPS[0].model_config.get("env_file")
    for file in (env_file, Path(usual) if isinstance(usual, str) and Path(usual).is_file() else None):
        if file is not None:
            _check_readable(file)
    groups = [_read(group, given, env_file) for group in GROUPS]
    settings = Settings(*groups)  # type: ignore[arg-type]  # one group for each field, in order
    for contradiction in CONTRADICTIONS:
        if (sentence := contradiction(settings)) is not None:
            raise StartupError(sentence)
    return replace(settings, access=with_key_file(settings.access))


def misspelt(env_file: Path | str | None = None) -> list[str]:
    """A sentence for each variable, in the environment or in `.env`, that is close to a setting's name and is none."""
    names = [name.upper() for group in GROUPS for name in group.model_fields]
    file = env_file or GROUPS[0].model_config.get("env_file")
    text = Path(file).read_text("utf-8") if isinstance(file, str | Path) and Path(file).is_file() else ""
    given = sorted({*os.environ, *ASSIGNED.findall(text)} - {*names})
    meant = {name: _close_to(name.upper(), names) for name in given if len(name) <= LONGEST_NAME}
    return [f"{name} is no setting: is {known} meant?" for name, known in meant.items() if known is not None]


def _close_to(name: str, names: Sequence[str]) -> str | None:
    """The setting with the same letters, or nearly. What ends with a setting's name is another program's."""
    letters = sorted(name)
    turned = [known for known in names if sorted(known) == letters]
    close = turned or get_close_matches(name, names, 1, CLOSE)
    return close[0] if close and not name.endswith(close[0]) else None


def _check_readable(env_file: Path | str) -> None:
    try:
        Path(env_file).read_text("utf-8")
    except OSError as error:
        raise StartupError(f"The file of settings {env_file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise StartupError(f"The file of settings {env_file} is no text.") from None


def _read(group: type[SettingsGroup], given: Mapping[str, object], env_file: Path | str | None) -> SettingsGroup:
    values = {name: value for name, value in given.items() if name in group.model_fields}
    try:
        return group(**values) if env_file is None else group(_env_file=env_file, **values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        description = group.model_fields[name].description
        shown = "" if name in SECRETS else f"={first['input']!r}"
        problem = first["msg"].removeprefix("Value error, ")
        raise StartupError(f"{name.upper()}{shown}: {problem}. {name.upper()} is: {description}") from None


def _client_batch_never_admitted(settings: Settings) -> str | None:
    batch, queued = settings.inference.max_client_batch_size, settings.inference.max_queued_tokens
    if batch <= queued:
        return None
    return (
        f"MAX_CLIENT_BATCH_SIZE={batch} is above MAX_QUEUED_TOKENS={queued}, so a full request could never be "
        f"admitted: raise MAX_QUEUED_TOKENS or lower MAX_CLIENT_BATCH_SIZE."
    )


def _more_rows_than_tokens(settings: Settings) -> str | None:
    rows, tokens = settings.engine.max_batch_size, settings.engine.max_batch_tokens
    if tokens is None or rows is None or rows <= tokens:
        return None
    return (
        f"MAX_BATCH_SIZE={rows} is above MAX_BATCH_TOKENS={tokens}, but every row has at least one token: "
        f"raise MAX_BATCH_TOKENS or lower MAX_BATCH_SIZE."
    )


def _input_longer_than_batch(settings: Settings) -> str | None:
    length, tokens = settings.model.max_model_len, settings.engine.max_batch_tokens
    if length is None or tokens is None or length <= tokens:
        return None
    return (
        f"MAX_MODEL_LEN={length} is above MAX_BATCH_TOKENS={tokens}, so the longest input would not fit a forward "
        f"pass: raise MAX_BATCH_TOKENS or lower MAX_MODEL_LEN."
    )


def _half_precision_on_cpu(settings: Settings) -> str | None:
    if settings.engine.device != "cpu" or settings.model.dtype != "float16":
        return None
    return (
        "DTYPE=float16 with DEVICE=cpu would be slow and overflow: set DTYPE to auto, bfloat16 or float32, "
        "or DEVICE to cuda."
    )


def _float8_without_a_card(settings: Settings) -> str | None:
    if settings.model.dtype != "fp8" or settings.engine.device not in ("cpu", "mps"):
        return None
    return (
        f"DTYPE=fp8 with DEVICE={settings.engine.device}: float8 needs an NVIDIA card of compute capability 8.9 or "
        f"newer: set DTYPE to auto, bfloat16 or float32, or DEVICE to cuda."
    )


def _undetermined(settings: Settings) -> str | None:
    """What DETERMINISTIC=true cannot be had with."""
    if not settings.model.deterministic:
        return None
    why = "its kernels are not known to give the same bits each time"
    if settings.model.dtype == "fp8":
        return f"DETERMINISTIC=true with DTYPE=fp8: {why}: set DTYPE to auto, bfloat16 or float32."
    if settings.engine.device == "mps":
        return f"DETERMINISTIC=true with DEVICE=mps: {why}: set DEVICE to cpu or cuda."
    if settings.engine.torch_compile == "true":
        return (
            "DETERMINISTIC=true with TORCH_COMPILE=true: what a compiler makes may differ between starts: leave it out."
        )
    return None


def _revision_of_several_models(settings: Settings) -> str | None:
    models = settings.model
    hub = [name for name in (*models.embed_model, *models.rerank_model) if "/" in name]
    alone = dict(models.revision).get("")
    if alone is None or len(hub) == 1:
        return None
    return (
        f"REVISION={alone} does not say of which model, and EMBED_MODEL and RERANK_MODEL name {len(hub)} of the hub: "
        f"write `owner/name={alone}`."
    )


def _drain_longer_than_stop(settings: Settings) -> str | None:
    drain, stop = settings.http.drain_seconds, settings.http.shutdown_seconds
    if drain < stop:
        return None
    return (
        f"DRAIN_SECONDS={drain:g} leaves nothing of SHUTDOWN_SECONDS={stop} to answer requests in progress: "
        f"raise SHUTDOWN_SECONDS or lower DRAIN_SECONDS."
    )


CONTRADICTIONS: tuple[Callable[[Settings], str | None], ...] = (
    _client_batch_never_admitted,
    _more_rows_than_tokens,
    _input_longer_than_batch,
    _half_precision_on_cpu,
    _float8_without_a_card,
    _undetermined,
    _revision_of_several_models,
    _drain_longer_than_stop,
)
