"""Free space, against what is to be fetched and what the server may write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants
from rich.filesize import decimal

from vecmill.core.errors import StartupError
from vecmill.tools.doctor.configured import configured
from vecmill.tools.doctor.context import Context
from vecmill.tools.doctor.report import Finding, fail, ok, together, warn

HUB_SECONDS = 10.0
LEAST = 100_000_000  # bytes: below, little can be kept


def check(context: Context) -> Finding:
    """The hub's cache, then STATE_DIR."""
    return together([_cache(context), _state(context)])


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _cache(context: Context) -> Finding:
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


def _state(context: Context) -> Finding:
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
