"""What the server holds while it runs: its address, its folder of state, and Redis where REDIS_URL names one."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vecmill import __version__
from vecmill.core.errors import StartupError
from vecmill.core.protocols import StoreFailed
from vecmill.storage.files import FileLock, sync_folder, unshared_locks, write_atomically
from vecmill.storage.formats import newer_state
from vecmill.tools.doctor.checks.models import existing
from vecmill.tools.doctor.context import DoctorContext, RunningServer
from vecmill.tools.doctor.findings import Finding, fail, install, ok, together, warn

if TYPE_CHECKING:  # importing it needs the extra `redis`
    from vecmill.storage.redis_connection import RedisFacts


def check_port(context: DoctorContext) -> Finding:
    """Bind it as the server would, for a moment, without listening."""
    host, port = context.settings.http.host, context.settings.http.port
    address = f"HOST={host} PORT={port}"
    if port == 0:
        return ok(f"{address}: a free port is taken")
    try:
        _bind(host, port)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return judge_taken(address, port, context.server)
        return judge_error(address, error)
    return ok(f"{address} is free")


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def judge_taken(address: str, port: int, server: RunningServer | None) -> Finding:
    """`server`: what answers at the address; None: nothing that speaks HTTP."""
    if server is None or not server.is_vecmill:
        who = "something that does not speak HTTP"
        if server is not None:
            who = f"an HTTP server that is not vecmill ({server.software or 'it does not say which'})"
        return fail(
            f"{address} is taken by {who}",
            f"sudo ss -ltnp 'sport = :{port}' shows what it is; stop it, or set another PORT.",
        )
    facts = {"version": server.version, "status": server.status}
    seen = f"{address}: vecmill {server.version} runs there, status {server.status}"
    if server.loading:
        seen += f", still loading {', '.join(server.loading)}"
    if server.status != "ok":
        return warn(seen, f"curl {server.url}/health says why; its log says more.", **facts)
    if server.version != __version__:
        return warn(seen, f"This is {__version__}: restart the server to have it run that.", **facts)
    return ok(seen, **facts)


def judge_error(address: str, error: Exception) -> Finding:
    """Why it cannot be bound, other than that it is taken."""
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM):
        return fail(f"{address}: this user may not bind it", "Set a PORT of 1024 or above.")
    reason = os.strerror(number) if isinstance(number, int) and number > 0 else str(error)
    return fail(
        f"{address} cannot be bound ({reason})", "Set HOST to an address of this machine, 127.0.0.1 or 0.0.0.0."
    )


ELSEWHERE = "Set STATE_DIR to a folder that this user may write."


def check_state(context: DoctorContext) -> Finding:
    """Write into it as the server does, and leave nothing behind."""
    redis = context.settings.state.redis_url
    parts = [_folder(context)]
    if (shared := context.settings.batches.batch_dir) is not None:
        parts.append(_batch_folder(shared))
    if redis is not None:
        parts.append(_redis(redis.get_secret_value()))
    return together(parts)


def _folder(context: DoctorContext) -> Finding:
    folder = context.settings.state.state_dir
    try:
        if folder.exists() and not folder.is_dir():
            return fail(f"STATE_DIR={folder} is a file", "Set STATE_DIR to a folder.")
        _write(existing(folder))
    except OSError as error:
        return fail(f"STATE_DIR={folder} cannot be written ({error.strerror})", ELSEWHERE)
    if (newer := _newer(folder, "STATE_DIR")) is not None:
        return newer
    shared = context.settings.state.redis_url is not None
    if _held(folder / "lock", shared=shared):
        return _judge_held(context, folder)
    return ok(f"STATE_DIR={folder} can be written{'' if folder.exists() else ', and is made at the start'}")


def _batch_folder(folder: Path) -> Finding:
    """Servers share it, so each must see the others' locks."""
    named = f"BATCH_DIR={folder}"
    if (trouble := unshared_locks(folder)) is not None:
        return fail(f"{named} {trouble}", "sudo mount -o remount,local_lock=none, or name another folder.")
    try:
        _write(existing(folder))
    except OSError as error:
        return fail(
            f"{named} cannot be written ({error.strerror})", "Set BATCH_DIR to a folder that this user may write."
        )
    if (newer := _newer(folder, "BATCH_DIR")) is not None:
        return newer
    if _held(folder / "lock", shared=True):
        return fail(f"{named} is the STATE_DIR of a server", "Give batches that servers share a folder of their own.")
    return ok(f"{named} can be written")


def _newer(folder: Path, setting: str) -> Finding | None:
    """What a newer version wrote is nothing for this one."""
    try:
        newer = newer_state(folder, setting)
    except OSError as error:
        return fail(f"{setting}={folder} cannot be used ({error.strerror})", f"Set {setting} to another folder.")
    if newer is None:
        return None
    problem, _, cure = newer.rpartition(". ")
    return fail(problem, cure)


def _write(folder: Path) -> None:
    inside = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        write_atomically(inside / "file", b"written by vecmill doctor\n")
        sync_folder(inside)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _held(lock: Path, *, shared: bool) -> bool:
    """Whether a server holds the lock. A lock that is free is taken for a moment and released."""
    if not lock.exists():
        return False
    taken = FileLock.take(lock, shared=shared)
    if taken is not None:
        taken.release()
    return taken is None


def _judge_held(context: DoctorContext, folder: Path) -> Finding:
    seen = f"STATE_DIR={folder} is in use by a vecmill server"
    if context.server is not None and context.server.is_vecmill:
        return ok(f"{seen}; one runs at {context.server.url}")
    return fail(
        seen,
        "Stop it, give this one a STATE_DIR of its own, or set REDIS_URL for both so that they share their state.",
    )


def _redis(url: str) -> Finding:
    """Whether it can be used; the check `redis` has the rest."""
    facts = _facts(url)
    return facts if isinstance(facts, Finding) else ok(f"{_where(url)} answers, version {facts.version}")


SLOW_MS = 5.0  # a round trip, of which a call of /jobs takes three


def check_redis(context: DoctorContext) -> Finding:
    """How fast it answers, what it does when it is full, whether jobs outlive it, who else is there."""
    given = context.settings.state.redis_url
    if given is None:
        return ok("REDIS_URL is not set: the cache and the jobs are in STATE_DIR")
    facts = _facts(url := given.get_secret_value())
    if isinstance(facts, Finding):
        return facts
    others = facts.servers - (1 if facts.servers and context.server is not None and context.server.is_vecmill else 0)
    seen = (
        f"{_where(url)} answers in {facts.latency_ms:.2f} ms: version {facts.version}, {facts.role}, "
        f"{facts.memory.shown()}, {facts.keeps or 'nothing'} on disk, {others} other servers of vecmill"
    )
    return judge_redis(seen, facts, others)


def judge_redis(seen: str, facts: RedisFacts, others: int) -> Finding:
    """Judge a Redis by its facts; `others`: servers of vecmill beside this one."""
    details = {
        "version": facts.version,
        "role": facts.role,
        "latency_ms": round(facts.latency_ms, 3),
        "used_bytes": facts.memory.used,
        "maxmemory_bytes": facts.memory.most,
        "maxmemory_policy": facts.memory.policy,
        "persistence": facts.keeps,
        "other_servers": others,
    }
    if facts.role != "master":
        return fail(seen, "It only follows another Redis and takes no changes: name that one in REDIS_URL.", **details)
    cures = [] if (problem := facts.memory.problem()) is None else [problem]
    if facts.keeps is None:
        cures.append("Redis keeps nothing on disk: set `appendonly yes`, so that jobs outlive it and all servers.")
    if facts.latency_ms > SLOW_MS:
        cures.append(
            f"A round trip takes more than {SLOW_MS:g} ms: have Redis nearer, every poll of a job takes three."
        )
    return warn(seen, "\n".join(cures), **details) if cures else ok(seen, **details)


def _where(url: str) -> str:
    parts = urlsplit(url)
    return f"REDIS_URL ({parts.hostname or parts.path})"  # never the password


def _facts(url: str) -> RedisFacts | Finding:
    """What Redis says of itself, or why that is nothing."""
    try:
        facts: RedisFacts = import_module("vecmill.storage.redis_connection").redis_facts(url)
    except ModuleNotFoundError:
        return fail(f"{_where(url)} needs the extra `redis`", install("vecmill[redis]"))
    except StartupError as error:
        return fail(f"{_where(url)} answers and cannot be used", error.message)
    except StoreFailed as error:
        return fail(
            f"{_where(url)} does not answer ({error})",
            "Start Redis, or correct REDIS_URL; without it the state is in files.",
        )
    return facts
