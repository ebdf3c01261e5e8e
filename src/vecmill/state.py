"""What outlives the process, opened and closed together: the folder, the cache, the jobs, the batches."""

from __future__ import annotations

import asyncio
import logging
from importlib import import_module
from typing import Any

from vecmill.batches.record import BatchStatus
from vecmill.batches.service import BatchService
from vecmill.cache.embedding_cache import EmbeddingCache
from vecmill.config import Settings
from vecmill.core.errors import StartupError
from vecmill.core.protocols import ReplicaStore, SharedUse, VectorStore
from vecmill.jobs.job import JobStatus
from vecmill.jobs.local import LocalJobs
from vecmill.jobs.queue import JobQueue, JobStore
from vecmill.jobs.shared import SharedJobs
from vecmill.storage.sqlite_jobs import SqliteJobs
from vecmill.storage.sqlite_vectors import SqliteVectors
from vecmill.storage.state_folder import StateFolder
from vecmill.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class State:
    """One server's. Belongs to the event loop's thread."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self._settings = settings
        self.folder: StateFolder | None = None
        """Held from `open` to `close`; None also where another server holds it."""
        self._batch_folder: StateFolder | None = None
        """The same where batches have a folder of their own."""
        self.cache: EmbeddingCache | None = None
        """None where nothing is cached."""
        self.replicas: ReplicaStore | None = None
        """None without Redis."""
        self.key_use: SharedUse | None = None
        """What keys have in progress at all servers; None where no others share this server's limits."""
        self.jobs = JobQueue(settings.jobs, telemetry.rates)
        self.batches = BatchService(settings.batches, settings.http.max_body_bytes, telemetry)
        self._looking: asyncio.Task[None] | None = None
        self._watch(telemetry)

    def _watch(self, telemetry: Telemetry) -> None:
        metrics, jobs, batches = telemetry.metrics, self.jobs, self.batches
        metrics.cache_entries.set_value(lambda: self.cache.size.entries if self.cache else 0)
        metrics.cache_bytes.set_value(lambda: self.cache.size.bytes if self.cache else 0)
        metrics.cache_dropped.set_value(lambda: self.cache.stats.dropped if self.cache else 0)
        metrics.cache_lost.set_value(lambda: self.cache.stats.lost if self.cache else 0)
        metrics.cache_failing.set_value(lambda: float(self.cache is not None and self.cache.failing))
        metrics.jobs.set_function(lambda: {(status.value,): jobs.count(status) for status in JobStatus})
        metrics.batches.set_function(lambda: {(state.value,): batches.count(state) for state in BatchStatus})

    async def open(self) -> None:
        """Go on with what was kept. Where it cannot be read now, the server serves all the same.

        Raises:
            StartupError: another server holds the folder, the extra `redis` is missing, or Redis cannot be used as it
                is configured.
        """
        settings = self._settings.state
        folder = StateFolder.open(settings.state_dir, shared=settings.redis_url is not None)
        self.folder = folder
        if (url := self._redis_url()) is not None:
            self.key_use = _redis_store("redis_limits", "RedisUse", url)
            await import_module("vecmill.storage.redis_connection").check_usable(url)
        self.cache = self._open_cache(folder)
        if url is not None:
            self.replicas = _redis_store("redis_replicas", "RedisReplicas", url)
        if (shared := self._settings.batches.batch_dir) is not None:
            self._batch_folder = StateFolder.open(shared, shared=True, setting="BATCH_DIR")
        files = self._batch_folder or folder
        self.batches.open(files.path, files.problem, files.setting)
        await self.jobs.open(self._job_store(folder))
        self.jobs.start()
        self._looking = asyncio.create_task(self._look_again_and_again(), name="state folder")

    async def _look_again_and_again(self) -> None:
        while self.folder is not None:
            try:
                await asyncio.to_thread(self._look)
            except Exception:  # out of memory or of threads: /health must not go by this look for ever
                logger.exception("the look at the state folder failed")
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        for folder in filter(None, (self.folder, self._batch_folder)):
            if folder.look() and folder is (self._batch_folder or self.folder):
                self.batches.begin_anew(folder.path)

    def problems(self) -> dict[str, str | None]:
        """Why the jobs, the cache and the batches are not kept now, each as a sentence; None where they are."""
        local = self._folder_problem()
        cache = None
        if self.cache is not None:
            cache = "The cache's store cannot be used." if self.cache.failing else local
        # Batches are in the folder whatever is in Redis.
        files = self._batch_folder or self.folder
        batches = self.batches.problem or (files.problem if files else None)
        return {"jobs": self.jobs.problem or local, "cache": cache, "batches": batches}

    def _folder_problem(self) -> str | None:
        """Of what is in the folder where there is no Redis."""
        return self.folder.problem if self.folder is not None and self._settings.state.redis_url is None else None

    def _open_cache(self, folder: StateFolder) -> EmbeddingCache | None:
        settings, url = self._settings.cache, self._redis_url()
        if settings.cache_max_bytes == 0 or (url is None and folder.problem is not None):
            return None
        store: VectorStore
        if url is not None:
            store = _redis_store("redis", "RedisVectors", url, settings.cache_max_bytes)
        else:
            store = SqliteVectors(folder.path / "cache.db", settings.cache_max_bytes)
        # Rounded, a vector from the cache would have other bits than the same one computed.
        return EmbeddingCache(store, "float32" if self._settings.model.deterministic else settings.cache_dtype)

    def _job_store(self, folder: StateFolder) -> JobStore:
        settings, url = self._settings.jobs, self._redis_url()
        if url is not None:
            return SharedJobs(settings, _redis_store("redis", "RedisJobs", url))
        return LocalJobs(settings, SqliteJobs(folder.path / "jobs.db") if folder.problem is None else None)

    def _redis_url(self) -> str | None:
        url = self._settings.state.redis_url
        return None if url is None else url.get_secret_value()

    async def close(self) -> None:
        """Write what is left, and let another server have the folder. Nothing may compute any more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self.jobs.close()
        if self.replicas is not None:
            await self.replicas.close()
        if self.cache is not None:
            await asyncio.to_thread(self.cache.close)
        for folder in (self.folder, self._batch_folder):
            if folder is not None:
                folder.close()


def _redis_store(module: str, name: str, url: str, *arguments: object) -> Any:
    """A class of a module of `storage`, connected to `url`.

    Raises:
        StartupError: the extra is missing, or the address is bad.
    """
    try:
        store = getattr(import_module(f"vecmill.storage.{module}"), name)
    except ModuleNotFoundError:
        raise StartupError("REDIS_URL needs the extra `redis`: pip install 'vecmill[redis]'.") from None
    try:
        return store(url, *arguments)
    except (ValueError, TypeError):  # the message may repeat the address, which may have a password
        raise StartupError("REDIS_URL has an option or a part that Redis' client does not know.") from None
