"""Who shares Redis with this server: what it says of itself there every few seconds, and what the others say.

Whatever is read was written by somebody else, of another version perhaps: each value is taken if it has the right type
and a size within bounds, else it is unknown. Ages are by Redis' clock alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic, time
from typing import Any, cast

import orjson
from fastapi import APIRouter, Request

from vecmill import __version__
from vecmill.core.errors import NotAllowed
from vecmill.core.protocols import REPLICA_BYTES, ReplicaStore, StoredReplica, StoreFailed
from vecmill.core.types import Lane, Viewer
from vecmill.http.dashboard.machine import Machine
from vecmill.http.dashboard.sampling import waiting_tokens
from vecmill.http.errors import documented
from vecmill.http.health import status_of
from vecmill.http.route import ViewerOf
from vecmill.http.services import Services

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
GONE_SECONDS = 15.0
"""After which a server that has not written again is taken for gone."""
FRESH_SECONDS = 1.5
PATIENCE = 0.25  # seconds that a snapshot waits for Redis
MOST_MODELS, MOST_JOBS = 16, 32
LONGEST_NAME, LONGEST_WORD, LONGEST_URL = 200, 40, 500
LARGEST_NUMBER = 1e18
GONE = "gone"
PROBLEM = "Redis cannot be used, so it is not known now which other replicas there are."

router = APIRouter(tags=["Dashboard"], responses=documented(403))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was read last."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Those that are records of other servers, with `age_seconds`."""
    unreadable: int = 0
    problem: str | None = None
    at: float = -inf
    """By `monotonic`."""


class Replicas:
    """This server among its replicas, from `start` to `close`. Belongs to the event loop's thread.

    Nothing of it holds up the server or fails with Redis. Without Redis there is this server alone.
    """

    def __init__(
        self, services: Services, machine: Machine, name: str, store: Callable[[], ReplicaStore | None]
    ) -> None:
        self._services, self._machine, self._store = services, machine, store
        self.name = name
        self._id = secrets.token_hex(8)
        """Of this process: two servers may have been given one name."""
        self._named = orjson.dumps({"replica": name})[:-1]
        self._own = orjson.dumps({"replica": name, "id": self._id})[:-1]
        self._seen = _Seen()
        self._told: str | None = None
        self._again = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to say that it is there."""
        if self._store() is not None:
            self._beating = asyncio.create_task(self._beat_for_ever(), name="replicas")

    def tell_now(self) -> None:
        """Say at once what has changed: the server begins to stop."""
        self._again.set()

    async def close(self) -> None:
        """Leave: others are not to take this server for one that was lost. Never raises."""
        tasks = [task for task in (self._beating, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._beating is not None and (store := self._store()) is not None:
            with suppress(StoreFailed):
                await store.remove(own=self._own)

    async def _beat_for_ever(self) -> None:
        while True:
            self._again.clear()
            await self._beat()
            if self._seen.at == -inf:  # so that whoever looks first need not wait, nor see a list that grows
                await self._read()
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._again.wait()

    async def _beat(self) -> None:
        store = self._store()
        if store is None:
            return
        problem = None
        try:
            if not await store.write(self._bounded(), name=self._named, own=self._own):
                problem = "there are more replicas in Redis than are listed: this one is not"
        except StoreFailed as error:
            problem = f"Redis does not take what this replica says of itself ({error})"
        except Exception:  # the next beat must come, whatever this one could not read
            logger.exception("this replica did not say that it is there")
        self._tell(problem)

    def _tell(self, problem: str | None) -> None:
        """Once, not with every beat."""
        if problem is not None and problem != self._told:
            logger.warning("the list of replicas is not whole: %s", problem)
        elif problem is None and self._told is not None:
            logger.info("this replica is in the list of replicas again")
        self._told = problem

    def _bounded(self) -> bytes:
        """This server's record, without some of its jobs and models where it would be too large."""
        record = self._record()
        while len(encoded := orjson.dumps(record)) > REPLICA_BYTES:
            parts = record["jobs"] or record["models"]
            parts.pop(next(reversed(parts)) if isinstance(parts, dict) else -1)
        return encoded

    def _record(self) -> dict[str, Any]:
        """What this server says of itself. The first two fields tell it from others, see `ReplicaStore`."""
        services, telemetry = self._services, self._services.telemetry
        rates, inference, minute = telemetry.rates, services.inference, telemetry.rates.minute
        memory = self._machine.memory_view()
        memory = memory["gpu"] or memory
        return {
            "replica": self.name,
            "id": self._id,
            "url": services.settings.http.replica_url,
            "version": __version__,
            "status": status_of(services)[0],
            "uptime_seconds": round(telemetry.rolling.uptime, 1),
            "texts_per_second": round(rates.per_second(minute.texts), 2),
            "requests_per_second": round(rates.per_second(minute.requests), 3),
            "searches_p95_ms": telemetry.rolling.recent_latency_ms(Lane.INTERACTIVE)["p95"],
            "queue": {
                "texts": sum(inference.waiting.values()),
                "tokens": sum(waiting_tokens(inference, lane) for lane in Lane),
            },
            "memory": {"ours_bytes": memory["ours_bytes"], "total_bytes": memory["total_bytes"]},
            "models": self._models(),
            "jobs": self._jobs(),
        }

    def _models(self) -> list[dict[str, Any]]:
        inference, warmed = self._services.inference, self._services.warmed()
        models = []
        for card in inference.cards[:MOST_MODELS]:
            fit = warmed[card.key].calibration if card.key in warmed else None
            queued = (tokens for (key, _), (_, tokens) in inference.queued.items() if key == card.key)
            models.append(
                {
                    "id": card.id[:LONGEST_NAME],
                    "task": card.task.value,
                    "queued_tokens": sum(queued),
                    "fixed_ms": fit and round(1000 * fit.fixed_seconds, 3),
                    "us_per_token": fit and round(1e6 * fit.seconds_per_token, 2),
                }
            )
        return models

    def _jobs(self) -> dict[str, float]:
        """Seconds since a request of each open job was answered here."""
        jobs, now, seconds = self._services.jobs, time(), dict[str, float]()
        for user in sorted(self._services.telemetry.rates.users(), key=lambda user: -user.last_seen):
            job = user.id.job
            if job is not None and job not in seconds and jobs.project(job, Viewer(user.id.owner)) is not None:
                seconds[job] = round(max(0.0, now - user.last_seen), 1)
            if len(seconds) == MOST_JOBS:
                break
        return seconds

    async def look(self) -> ReplicasView:
        """All replicas, the others as they were FRESH_SECONDS ago at the most, or a little longer where Redis is slow.

        Nothing is read while nobody looks.
        """
        own = _shown(self._record() | {"age_seconds": 0.0})
        if self._store() is None:
            return ReplicasView(own, _Seen())
        if self._reading is None and monotonic() - self._seen.at > FRESH_SECONDS:
            self._reading = asyncio.create_task(self._read(), name="other replicas")
        if self._reading is not None and self._seen.problem is None:  # else everybody would wait for a Redis that hangs
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await asyncio.shield(self._reading)
        return ReplicasView(own, self._seen)

    async def _read(self) -> None:
        """What Redis has. Never raises: what cannot be read is a problem that is shown."""
        store = self._store()
        try:
            if store is not None:
                self._seen = self._of(await store.read())
        except StoreFailed:
            self._seen = _Seen(problem=PROBLEM, at=monotonic())
        except Exception:  # whatever somebody has written there
            logger.exception("the replicas in Redis were not read")
            self._seen = _Seen(problem=PROBLEM, at=monotonic())
        finally:
            self._reading = None

    def _of(self, stored: Iterable[StoredReplica]) -> _Seen:
        found = [_parsed(each) for each in stored]
        unreadable = sum(each is None for each in found)
        if unreadable > self._seen.unreadable:
            logger.warning("%d records of replicas in Redis cannot be read: they are left out", unreadable)
        youngest: dict[str, dict[str, Any]] = {}
        for record in sorted((each for each in found if each is not None), key=lambda each: -each["age_seconds"]):
            youngest[record["id"]] = record
        youngest.pop(self._id, None)
        return _Seen(list(youngest.values()), unreadable, None, monotonic())


class ReplicasView:
    """All replicas at one moment, this one first."""

    def __init__(self, own: dict[str, Any], seen: _Seen) -> None:
        others = [_shown(record) for record in seen.records]
        alive = {each["replica"] for each in (own, *others) if each["status"] != GONE}
        # A server that is there again under its name is not gone.
        others = [each for each in others if each["status"] != GONE or each["replica"] not in alive]
        others.sort(key=lambda each: (each["status"] == GONE, each["replica"]))
        self._all = [own | {"this": True}, *others]
        self._seen = seen
        self._jobs = self._last_seen_jobs(own)

    def _last_seen_jobs(self, own: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
        """Of each job the seconds since a request of it was answered, and the replica that did it."""
        jobs: dict[str, tuple[float, str]] = {}
        for record in (own, *self._seen.records):
            for job, seconds in _object(record.get("jobs")).items():
                number = _number(seconds)
                if number is not None:
                    last = number + record["age_seconds"], record["replica"]
                    jobs[job] = min(jobs.get(job, last), last)
        return jobs

    def replica_of_job(self, job_id: str) -> str | None:
        """Where a request of the job was last answered; None where that is not known, or there is this server alone."""
        seconds_and_name = self._jobs.get(job_id) if len(self._all) > 1 else None
        return None if seconds_and_name is None else seconds_and_name[1]

    def warnings(self) -> list[dict[str, str]]:
        """What is wrong, as `Machine.warnings` gives it."""
        own, *others = self._all
        if not any(each["replica"] == own["replica"] and each["status"] != GONE for each in others):
            return []
        return [{"name": "replica", "text": f"Another replica is called {own['replica']} too: set REPLICA for each."}]

    def as_json(self, *, everything: bool) -> dict[str, Any]:
        """How many there are; who they are and what they do together is for administrators."""
        alive = [each for each in self._all if each["status"] != GONE]
        items = [{name: value for name, value in each.items() if name not in INTERNAL} for each in self._all]
        totals = {
            "ready": sum(each["status"] == "ok" for each in alive),
            "texts_per_second": _total(each["texts_per_second"] for each in alive),
            "requests_per_second": _total(each["requests_per_second"] for each in alive),
            "queue": {name: _total(each["queue"][name] for each in alive) for name in ("texts", "tokens")},
        }
        return {
            "count": len(items),
            "unreadable": self._seen.unreadable,
            "problem": self._seen.problem,
            "totals": totals if everything else None,
            "items": items if everything else None,
        }


INTERNAL = ("jobs", "age_seconds")  # what only the jobs and the order need


def _parsed(stored: StoredReplica) -> dict[str, Any] | None:
    """A server's record; None where it is none."""
    try:
        record = None if stored.record is None else orjson.loads(stored.record)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not _text(record.get("replica"), LONGEST_NAME):
        return None
    identifier = record.get("id")
    if not isinstance(identifier, str) or not 0 < len(identifier) <= LONGEST_WORD:
        return None
    name = _text(record["replica"], LONGEST_NAME)
    return record | {"replica": name, "age_seconds": stored.age_seconds}


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is told to others, with null for what is not as it should be."""
    is_gone = record["age_seconds"] > GONE_SECONDS
    url = _text(record.get("url"), LONGEST_URL)
    measured = {} if is_gone else record  # of one that is gone nobody knows them now
    queue, memory = _object(measured.get("queue")), _object(measured.get("memory"))
    numbers = ("uptime_seconds", "texts_per_second", "requests_per_second", "searches_p95_ms")
    models = record.get("models")
    return {
        "replica": record["replica"],
        "id": record["id"],
        "this": False,
        "url": url if url is not None and url.startswith(("http://", "https://")) else None,
        "version": _text(record.get("version"), LONGEST_WORD),
        "status": GONE if is_gone else _text(record.get("status"), LONGEST_WORD),
        "gone_since": round(time() - record["age_seconds"], 1) if is_gone else None,
        **{name: _number(measured.get(name)) for name in numbers},
        "queue": {name: _number(queue.get(name)) for name in ("texts", "tokens")},
        "memory": {name: _number(memory.get(name)) for name in ("ours_bytes", "total_bytes")},
        "models": [_shown_model(_object(model)) for model in models[:MOST_MODELS]] if isinstance(models, list) else [],
        "jobs": record.get("jobs"),
        "age_seconds": record["age_seconds"],
    }


def _shown_model(model: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("queued_tokens", "fixed_ms", "us_per_token")
    return {
        "id": _text(model.get("id"), LONGEST_NAME),
        "task": _text(model.get("task"), LONGEST_WORD),
        **{name: _number(model.get(name)) for name in numbers},
    }


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object, longest: int) -> str | None:
    """Cut, and without what would not print."""
    if not isinstance(value, str):
        return None
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value[:longest])


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return cast(float, value) if is_number and 0 <= cast(float, value) < LARGEST_NUMBER else None


def _total(values: Iterable[float | None]) -> float | None:
    """The sum, unknown where one of them is."""
    known = list(values)
    return None if None in known else round(sum(cast(list[float], known)), 3)


@router.get("/dashboard/replicas", summary="The servers that share Redis")
async def list_replicas(request: Request, viewer: ViewerOf) -> dict[str, Any]:
    """Each with its state, models, queue, rates and memory, this server first (`this`); their totals. `gone`: it has
    not been heard of for 15 seconds, and is listed for 15 minutes. Without REDIS_URL there is this server alone. Needs
    the scope `admin` where there are keys."""
    if not viewer.everything:
        raise NotAllowed(
            "/dashboard/replicas is for keys with the scope `admin`: send such a key, or that of ADMIN_API_KEY."
        )
    return (await cast(Replicas, request.app.state.server.replicas).look()).as_json(everything=True)
