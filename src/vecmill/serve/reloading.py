"""SIGHUP: the settings are read again, and keys and aliases exchanged while the server goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

from vecmill.app import Server
from vecmill.config import AccessSettings, Settings
from vecmill.config.key_file import KeyEntry, readable_by_others
from vecmill.core.errors import StartupError, VecmillError
from vecmill.serve.systemd import Notifier

logger = logging.getLogger(__name__)

LIVE = frozenset({"api_key", "api_key_file", "admin_api_key", "model_aliases"})


class Reloading:
    """Reads the settings again whenever it is asked to. Belongs to the event loop's thread."""

    def __init__(self, server: Server, settings: Settings, reread: Callable[[], Settings], notifier: Notifier) -> None:
        """`reread` gives the settings as they are now, or raises StartupError; it is called in a thread."""
        self._server = server
        self._settings = settings
        self._reread = reread
        self._notifier = notifier
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Reload soon. Asked again meanwhile, it reloads once more."""
        self._asked.set()

    async def run(self) -> None:
        """Reload whenever it is asked for, until cancelled."""
        while True:
            await self._asked.wait()
            await self._server.load_ended.wait()  # aliases are of models that are loaded
            self._asked.clear()
            self._tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
            try:
                await self._reload()
            except VecmillError as error:
                logger.error("SIGHUP: nothing is changed: %s", error.message)
            except Exception:
                logger.exception("SIGHUP: nothing is changed")
            self._tell(READY=1)

    def _tell(self, **assignments: int) -> None:
        """A server that is not ready must not say so, nor one that stops."""
        if self._server.health.ready:
            self._notifier.send(**assignments)

    async def _reload(self) -> None:
        before, now = self._settings, await asyncio.to_thread(self._reread)
        _check_locked(before.access, now.access)
        self._server.inference.rename(before.model.model_aliases, now.model.model_aliases)
        self._server.keys.exchange(now.access)
        self._settings = now
        logger.info("SIGHUP: %s", "; ".join(_changes(before, now)) or "nothing has changed")
        if others := sorted(_others(before, now)):
            logger.warning("SIGHUP: %s changed too, which takes effect at the next start", ", ".join(others))
        warn_of_readable_keys(now.access)


def warn_of_readable_keys(access: AccessSettings) -> None:
    """Say so where other users can read the keys."""
    if access.api_key_file is not None and readable_by_others(access.api_key_file):
        logger.warning("API_KEY_FILE=%s can be read by other users: chmod 600 it", access.api_key_file)


def _check_locked(before: AccessSettings, now: AccessSettings) -> None:
    """Opening the server to everyone takes a restart: a file that was emptied by mistake must not do it."""
    if now.api_key:
        return
    if before.api_key:
        raise StartupError("API_KEY and API_KEY_FILE hold no key any more; to open the server to everyone, restart it.")
    if before.admin_api_key and not now.admin_api_key:
        raise StartupError(
            "ADMIN_API_KEY is gone, and there is no API_KEY; to let everyone do all, restart the server."
        )


def _changes(before: Settings, now: Settings) -> Iterator[str]:
    """What is different, by names, never by keys."""
    if keys := _changed_keys(before.access.api_key, now.access.api_key):
        yield f"keys: {keys}"
    if before.access.admin_api_key != now.access.admin_api_key:
        yield "ADMIN_API_KEY changed" if now.access.admin_api_key else "ADMIN_API_KEY is gone"
    if before.model.model_aliases != now.model.model_aliases:
        aliases = ", ".join(f"{alias}={name}" for alias, name in now.model.model_aliases)
        yield f"MODEL_ALIASES: {aliases or 'none'}"


def _changed_keys(entries_before: Iterable[KeyEntry], entries_now: Iterable[KeyEntry]) -> str:
    before, now = ({entry.name: entry for entry in entries} for entries in (entries_before, entries_now))
    changes = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    return "; ".join(f"{what} {', '.join(names)}" for what, names in changes.items() if names)


def _others(before: Settings, now: Settings) -> Iterator[str]:
    for group in fields(Settings):
        old, new = getattr(before, group.name), getattr(now, group.name)
        for name in type(old).model_fields:
            if name not in LIVE and getattr(old, name) != getattr(new, name):
                yield name.upper()
