"""What the dashboard shows at one moment, as JSON, for one viewer and one page of jobs and batches.

What is not known, or not for this viewer, is null, never zero. Rates are those of `telemetry.rates`.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from time import time
from typing import Any

from fastapi import FastAPI

from vecmill import __version__
from vecmill.batches.record import BatchRecord, BatchStatus
from vecmill.batches.service import LookedUp
from vecmill.core.errors import VecmillError
from vecmill.core.types import Lane, Viewer
from vecmill.http.batches import batch_object
from vecmill.http.dashboard.machine import Machine
from vecmill.http.dashboard.replicas import Replicas, ReplicasView
from vecmill.http.dashboard.sampling import waiting_tokens
from vecmill.http.health import status_of
from vecmill.http.models import models_snapshot
from vecmill.http.services import Services
from vecmill.http.stats import cache_facts
from vecmill.jobs.job import JobStatus
from vecmill.jobs.views import JobQuery
from vecmill.telemetry.rates import Passes, User
from vecmill.telemetry.refusals import Refusal

PAGE_SIZE = 25
MOST_USERS = 50
DISK_PATIENCE = 0.5  # seconds, for records of ended batches and sizes of files


@dataclass(frozen=True, slots=True)
class SnapshotQuery:
    """Which jobs and batches are wanted."""

    jobs_text: str = ""
    jobs_status: JobStatus | None = None
    jobs_page: int = 1
    batches_page: int = 1


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """Who looks, and at what: equal ones are shown the same."""

    owner: str | None
    everything: bool
    shows_work: bool
    """Whether counts that tell of others' texts are shown, see `shows_work_of_all`."""
    query: SnapshotQuery

    @property
    def viewer(self) -> Viewer:
        """Whose things are shown."""
        return Viewer(self.owner, self.everything)


@dataclass(frozen=True, slots=True)
class BatchesView:
    """What a snapshot says of batches."""

    shown: Sequence[BatchRecord]
    input_bytes: Mapping[str, int | None]
    of_users: Mapping[str, BatchRecord]
    """Those for which users have lately sent texts, by their ids."""
    counts: Counter[BatchStatus]
    page: int
    pages: int


class Snapshots:
    """Makes them. Belongs to the event loop's thread."""

    def __init__(self, app: FastAPI, services: Services, machine: Machine, replicas: Replicas) -> None:
        self._services, self._machine, self._replicas = services, machine, replicas
        self._words = ClientWords(app)

    async def of(self, view: SnapshotView) -> dict[str, Any]:
        """What is so now."""
        services, refusals = self._services, self._refusals(view)
        users = self._users(view)
        batches = await self._look_at_batches(view, users)
        if refusals:
            await self._words.learn()
        replicas = await self._replicas.look()
        status, text = status_of(services)
        _, percent, _ = services.health.snapshot()
        return {
            "at": round(time(), 3),
            "version": __version__,
            "uptime_seconds": round(services.telemetry.rolling.uptime, 1),
            "replica": self._replicas.name,
            "status": status,
            "status_text": text,
            "percent": round(percent),
            "ready": status == "ok",
            "is_admin": view.everything,
            "keys_in_use": services.keys_in_use(),
            "warnings": [*self._machine.warnings(), *replicas.warnings()],
            "replicas": replicas.as_json(everything=view.everything),
            "now": self._now(view),
            "who": [self._user(user, batches.of_users.get(user.id.job or "")) for user in users],
            "refusals": [self._refusal(refusal) for refusal in refusals],
            "jobs": self._jobs(view, replicas),
            "batches": self._batches(batches),
            "models": models_snapshot(services, view.viewer),
            "machine": self._machine.view(),
        }

    def _now(self, view: SnapshotView) -> dict[str, Any]:
        services, telemetry = self._services, self._services.telemetry
        rates, rolling, inference = telemetry.rates, telemetry.rolling, services.inference
        minute, passes = rates.minute, rates.passes
        return {
            "texts_per_second": round(rates.per_second(minute.texts), 2),
            "tokens_per_second": round(rates.per_second(minute.tokens), 1),
            "requests_per_second": round(rates.per_second(minute.requests), 3),
            "searches_per_second": round(rates.per_second(minute.searches), 3),
            "latency_ms": {
                lane.value: {name: value for name, value in rolling.recent_latency_ms(lane).items() if name in SHOWN}
                for lane in Lane
            },
            "queue": {
                lane.value: {"texts": inference.waiting[lane], "tokens": waiting_tokens(inference, lane)}
                for lane in Lane
            },
            "cache": self._cache() if view.shows_work else None,
            "batch_fill": self._batch_fill(view),
            "device_busy_ratio": round(min(1.0, rates.per_second(passes.seconds)), 3) if view.shows_work else None,
            "errors": rolling.errors,
            "refused": rolling.refused,
        }

    def _cache(self) -> dict[str, Any] | None:
        facts = cache_facts(self._services)
        if facts is None:
            return None
        minute = self._services.telemetry.rates.minute
        return {
            "hit_ratio": round(minute.cached_texts / minute.texts, 4) if minute.texts else None,
            "tokens_saved": facts["hit_tokens"],
            **{name: facts[name] for name in ("entries", "bytes", "max_bytes")},
        }

    def _batch_fill(self, view: SnapshotView) -> dict[str, float | None]:
        passes, warmed = self._services.telemetry.rates.passes, self._services.warmed()
        knee: float | None = next((model.calibration.knee_tokens for model in warmed.values()), None)
        if passes.passes and view.shows_work:
            knee = passes.knee_tokens / passes.passes  # of the models that ran
        shown = passes if view.shows_work else Passes()
        return {
            "tokens_per_pass": rounded(shown.tokens_per_pass, 1),
            "knee_tokens": rounded(knee, 1),
            "ratio": rounded(shown.fill_ratio, 3),
        }

    def _users(self, view: SnapshotView) -> list[User]:
        viewer = view.viewer
        return [user for user in self._services.telemetry.rates.users() if viewer.sees(user.id.owner)][:MOST_USERS]

    def _user(self, user: User, batch: BatchRecord | None) -> dict[str, Any]:
        rates, minute, lately, who = self._services.telemetry.rates, user.minute.sums(), user.lately.sums(), user.id
        # Clients say which job a request is of: one that is another key's has no name here.
        name = None if who.job is None else self._services.jobs.project(who.job, Viewer(who.owner))
        return {
            "key": self._services.key_name(who.owner),
            "client": who.client,
            "job": who.job,
            "job_name": batch_name(batch) if batch is not None and batch.owner == who.owner else name,
            "texts_per_second": round(rates.per_second(minute.texts), 2),
            "tokens_per_second": round(rates.per_second(minute.tokens), 1),
            "requests": lately.requests,
            "texts": lately.texts,
            "tokens": lately.tokens,
            "last_seen": round(user.last_seen, 1),
        }

    def _refusals(self, view: SnapshotView) -> list[Refusal]:
        """A key that is not an administrator's sees its own. Without a key nobody knows whose a request was."""
        kept = self._services.telemetry.refusals
        if view.everything:
            return list(kept)
        return kept.of(view.owner) if view.owner else []

    def _refusal(self, refusal: Refusal) -> dict[str, Any]:
        field = self._words.field(refusal.param)
        return {
            "at": round(refusal.at, 1),
            "request_id": refusal.request_id,
            "status": refusal.status,
            "error": refusal.error,
            "reason": refusal.reason if field is None else f"{refusal.reason} (`{field}`)",
            "path": self._words.path(refusal.path),
            "client": refusal.client,
            "key": refusal.key,
        }

    def _jobs(self, view: SnapshotView, replicas: ReplicasView) -> dict[str, Any]:
        query, jobs = view.query, self._services.jobs
        wanted = JobQuery(query.jobs_text, query.jobs_status, (query.jobs_page - 1) * PAGE_SIZE, PAGE_SIZE)
        page, views = jobs.page(wanted, view.viewer)
        number, pages = paged(query.jobs_page, page.total)
        if number != query.jobs_page:  # there are fewer than there were
            page, views = jobs.page(replace(wanted, first=(number - 1) * PAGE_SIZE), view.viewer)
        items = [
            views.detailed(job)
            | {"key": self._services.key_name(job.owner), "replica": replicas.replica_of_job(job.id)}
            for job in page.jobs
        ]
        return {"counts": page.counts, "total": page.total, "page": number, "pages": pages, "items": items}

    async def _look_at_batches(self, view: SnapshotView, users: Sequence[User]) -> BatchesView:
        """A disk that hangs or fails must not hold up what else is shown: then ended batches are left out."""
        jobs = {user.id.job for user in users if user.id.job is not None}
        seen = self._services.batches.seen(view.viewer, jobs)
        going_on = {record.id: record for record in sorted(seen.going_on, key=lambda record: record.ended)}
        number, pages = paged(view.query.batches_page, len(going_on) + len(seen.ended))
        ids = chain(going_on, (batch.id for batch in seen.ended))
        shown = [*islice(ids, (number - 1) * PAGE_SIZE, number * PAGE_SIZE)]
        looked_up = LookedUp()
        with suppress(TimeoutError, VecmillError):
            async with asyncio.timeout(DISK_PATIENCE):
                wanted = {*shown, *(jobs & seen.ended_ids)}
                looked_up = await self._services.batches.look(wanted, going_on, view.viewer)
        known = {**looked_up.records, **going_on}
        return BatchesView(
            [known[batch_id] for batch_id in shown if batch_id in known],
            looked_up.input_bytes,
            {batch_id: known[batch_id] for batch_id in jobs & known.keys()},
            seen.counts,
            number,
            pages,
        )

    def _batches(self, batches: BatchesView) -> dict[str, Any]:
        return {
            "counts": {status.value: batches.counts[status] for status in BatchStatus},
            "total": batches.counts.total(),
            "page": batches.page,
            "pages": batches.pages,
            "items": [self._batch(record, batches.input_bytes.get(record.id)) for record in batches.shown],
        }

    def _batch(self, record: BatchRecord, input_bytes: int | None) -> dict[str, Any]:
        rates, progress = self._services.telemetry.rates, record.progress
        lines = rates.lines_of_batch(record.id) if self._services.batches.runs(record.id) else None
        eta = round(max(0, record.total - progress.lines) / rates.per_second(lines), 1) if lines else None
        return {
            **batch_object(record),
            "name": batch_name(record),
            "key": self._services.key_name(record.owner),
            "lines_per_second": None if lines is None else round(rates.per_second(lines), 3),
            "texts_per_second": None if lines is None else round(rates.per_second(rates.texts_of_job(record.id)), 3),
            "eta_seconds": eta,
            "input_bytes": input_bytes,
            "output_bytes": progress.output_bytes,
            "error_bytes": progress.error_bytes,
        }


SHOWN = ("p50", "p95")


def rounded(value: float | None, digits: int) -> float | None:
    """The value with fewer digits; None stays None."""
    return None if value is None else round(value, digits)


def paged(page: int, total: int) -> tuple[int, int]:
    """The page, or the last where it is beyond that, and how many there are: one at the least."""
    pages = max(1, -(-total // PAGE_SIZE))
    return min(page, pages), pages


def batch_name(record: BatchRecord) -> str | None:
    """What a batch's creator calls it in its metadata."""
    metadata = record.metadata or {}
    return metadata.get("name") or metadata.get("description") or metadata.get("project")


class ClientWords:
    """Tells what clients write apart from what this server knows, so that only that is shown."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._fields: frozenset[str] = frozenset()
        self._routes: list[tuple[re.Pattern[str], str]] = []

    async def learn(self) -> None:
        """Read the API's own words, once. Takes half a second of a thread."""
        if not self._routes:
            schema = await asyncio.to_thread(self._app.openapi)
            self._fields = frozenset(_fields(schema))
            # The most precise first: `/jobs/recent` before `/jobs/{job_id}`.
            paths = sorted(schema["paths"], key=lambda path: (path.count("{"), -len(path)))
            self._routes = [(re.compile(PARAMETER.sub(".+", path)), path) for path in paths]

    def field(self, param: str | None) -> str | None:
        """A field at fault, up to where it is no name that the server knows: `input[3]`; None where nothing is left."""
        known: list[str] = []
        for part in (param or "").split("."):
            name, bracket, index = part.partition("[")
            if name not in self._fields or (bracket and not index[:-1].isdecimal()):
                break
            known.append(part[:LONGEST_FIELD])
        return ".".join(known) or None

    def path(self, path: str) -> str | None:
        """The route of a path, its parts that clients choose as names; None where nothing is served."""
        return next((route for pattern, route in self._routes if pattern.fullmatch(path)), None)


PARAMETER = re.compile(r"{[^}]*}")
LONGEST_FIELD = 100


def _fields(schema: Any) -> set[str]:
    """The names of all properties and parameters in an OpenAPI document."""
    if isinstance(schema, list):
        return {name for part in schema for name in _fields(part)}
    if not isinstance(schema, dict):
        return set()
    names = {name for part in schema.values() for name in _fields(part)}
    if isinstance(properties := schema.get("properties"), dict):
        names |= properties.keys()
    if isinstance(schema.get("in"), str) and isinstance(schema.get("name"), str):
        names.add(schema["name"])
    return names
