"""STATE_DIR: writable, and nobody else's; REDIS_URL: there."""

from __future__ import annotations

import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from vecmill.core.protocols import StoreFailed
from vecmill.doctor.checks.disk import existing
from vecmill.doctor.context import Context
from vecmill.doctor.installing import install
from vecmill.doctor.report import Finding, fail, ok, together
from vecmill.storage.files import FileLock, sync_folder, write_atomically

ELSEWHERE = "Set STATE_DIR to a folder that this user may write."


def check(context: Context) -> Finding:
    """Write into it as the server does, and leave nothing behind."""
    redis = context.settings.state.redis_url
    parts = [_folder(context)]
    if redis is not None:
        parts.append(_redis(redis.get_secret_value()))
    return together(parts)


def _folder(context: Context) -> Finding:
    folder = context.settings.state.state_dir
    try:
        if folder.exists() and not folder.is_dir():
            return fail(f"STATE_DIR={folder} is a file", "Set STATE_DIR to a folder.")
        _write(existing(folder))
    except OSError as error:
        return fail(f"STATE_DIR={folder} cannot be written ({error.strerror})", ELSEWHERE)
    shared = context.settings.state.redis_url is not None
    if _held(folder / "lock", shared=shared):
        return _judge_held(context, folder)
    return ok(f"STATE_DIR={folder} can be written{'' if folder.exists() else ', and is made at the start'}")


def _write(folder: Path) -> None:
    inside = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        write_atomically(inside / "file", b"written by vecmill doctor\n")
        sync_folder(inside)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _held(lock: Path, *, shared: bool) -> bool:
    """Whether another server keeps this one out. Its own lock is not touched; ours goes at once."""
    if not lock.exists():
        return False
    taken = FileLock.take(lock, shared=shared)
    if taken is not None:
        taken.release()
    return taken is None


def _judge_held(context: Context, folder: Path) -> Finding:
    seen = f"STATE_DIR={folder} is in use by a vecmill server"
    if context.server is not None and context.server.is_vecmill:
        return ok(f"{seen}; one runs at {context.server.url}")
    return fail(
        seen,
        "Stop it, give this one a STATE_DIR of its own, or set REDIS_URL for both so that they share their state.",
    )


def _redis(url: str) -> Finding:
    parts = urlsplit(url)
    where = f"REDIS_URL ({parts.hostname or parts.path})"  # never the password
    try:
        ping = import_module("vecmill.storage.redis").ping
    except ModuleNotFoundError:
        return fail(f"{where} needs the extra `redis`", install("vecmill[redis]"))
    try:
        version = ping(url)
    except StoreFailed as error:
        return fail(
            f"{where} does not answer ({error})", "Start Redis, or correct REDIS_URL; without it the state is in files."
        )
    return ok(f"{where} answers, version {version}")
